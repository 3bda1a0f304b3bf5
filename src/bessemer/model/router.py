"""Which experts a token visits, and how the load is kept even."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.config import ModelConfig

# Shapes: N tokens, D hidden, E experts, k experts of a token, G groups of experts.


class Routing(NamedTuple):
    """The chosen experts of each token and their weights, (N, k)."""

    experts_Nk: Tensor
    weights_Nk: Tensor


class Router(nn.Module):
    """Token-choice top-k routing.

    Scores are a softmax over all experts, or a sigmoid of each. A correction bias steers the choice and never the weights
    (Wang et al. 2024); with groups, a token first chooses the groups with the largest sum of their two best (DeepSeek-V3,
    section 2.1.2). Computed in float32, because two scores that are close decide where a token goes; in float64 where the
    states are.
    """

    correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None
        self.has_correction = config.router_correction_bias
        if self.has_correction:
            self.register_buffer("correction_bias", torch.zeros(config.num_experts))
        self.chosen, self.groups, self.chosen_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        self.sigmoid, self.normed = config.scoring_func == "sigmoid", config.norm_topk_prob
        self.factor = config.routed_scaling_factor
        #: Of the last forward, in training: logits (N, E) and choices (N, k), for the losses and the statistics.
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden_ND: Tensor) -> Routing:
        """Choose experts for each token."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            wide = torch.promote_types(hidden_ND.dtype, torch.float32)
            bias = None if self.bias is None else self.bias.to(wide)
            logits_NE = functional.linear(hidden_ND.to(wide), self.weight.to(wide), bias)
        scores_NE = logits_NE.sigmoid() if self.sigmoid else logits_NE.softmax(-1)
        experts_Nk = self._choose(scores_NE.detach())
        weights_Nk = scores_NE.gather(1, experts_Nk)
        if self.normed:
            weights_Nk = weights_Nk / (weights_Nk.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            self.last = (logits_NE, experts_Nk)
        return Routing(experts_Nk, weights_Nk * self.factor)

    def _choose(self, scores_NE: Tensor) -> Tensor:
        if self.has_correction:
            scores_NE = scores_NE + self.correction_bias.float()
        if self.groups > 1:
            scores_NGE = scores_NE.unflatten(1, (self.groups, -1))
            best_NG = scores_NGE.topk(2, dim=-1).values.sum(-1)
            groups = best_NG.topk(self.chosen_groups, dim=-1).indices
            outside_NG = torch.ones_like(best_NG, dtype=torch.bool).scatter(1, groups, False)
            scores_NE = scores_NGE.masked_fill(outside_NG[..., None], -torch.inf).flatten(1)
        return scores_NE.topk(self.chosen, dim=-1).indices


def visits(experts_Nk: Tensor, experts: int) -> Tensor:
    """How many tokens visit each expert, (E,) int64. A sum of ones: the shape does not hang on the values."""
    chosen = experts_Nk.flatten()
    return chosen.new_zeros(experts).index_add_(0, chosen, torch.ones_like(chosen))


def load(experts_Nk: Tensor, experts: int) -> Tensor:
    """Share of all visits that each expert gets, (E,); 1 / E each is even."""
    return visits(experts_Nk, experts).float() / experts_Nk.numel()


def balance_loss(logits_NE: Tensor, experts_Nk: Tensor) -> Tensor:
    """E Σ_e f_e p_e, with f the share of visits and p the mean probability of each expert: 1 when even (Fedus et al. 2022,
    eq. 4-6, for k experts a token)."""
    experts = logits_NE.shape[1]
    return experts * (load(experts_Nk, experts) * logits_NE.softmax(-1).mean(0)).sum()


def router_z_loss(logits_NE: Tensor) -> Tensor:
    """Mean square of the logits' log-sum-exp, which keeps them small (Zoph et al. 2022, eq. 5)."""
    return logits_NE.logsumexp(-1).square().mean()


@torch.no_grad()
def update_correction_bias(router: Router, visits_E: Tensor, rate: float) -> None:
    """Move the bias of experts with fewer visits than the mean up by `rate`, of those with more down (Wang et al. 2024,
    algorithm 1). Once per optimizer step, with the step's visits: gradient accumulation must not repeat it."""
    router.correction_bias += rate * torch.sign(visits_E.float().mean() - visits_E)
