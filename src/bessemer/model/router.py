"""The router: which experts a token visits, and how their load is balanced."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.config import ModelConfig
from bessemer.model.device import widest_float

# Shapes: B rows, T tokens of a row, N tokens of all rows, D hidden, E experts, k experts of a token, G groups of experts.


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
        self.chosen = config.num_experts_per_tok
        self.groups = config.n_group
        self.chosen_groups = config.topk_group
        self.sigmoid = config.scoring_func == "sigmoid"
        self.normed = config.norm_topk_prob
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


def visits_by_row(experts_BTk: Tensor, counted_BT: Tensor, experts: int) -> Tensor:
    """How many of the counted tokens of each row visit each expert, (B, E) int64."""
    rows, _, chosen = experts_BTk.shape
    row_B = torch.arange(rows, device=experts_BTk.device)
    places = (experts_BTk + experts * row_B[:, None, None]).flatten()
    weights = counted_BT[..., None].expand(-1, -1, chosen).flatten().long()
    return weights.new_zeros(rows * experts).index_add_(0, places, weights).view(rows, experts)


def balance_loss(logits_BTE: Tensor, visits_BE: Tensor, counted_BT: Tensor) -> Tensor:
    """E Σ_e f_e p_e of each row, with f the share of its visits and p the mean probability of each expert (Fedus et al. 2022,
    eq. 4-6, for k experts a token; of each row by itself, as DeepSeek-V3, eq. 17-20): 1 when even.

    Of all rows the mean, each weighing as many as it has tokens that count: so it is a mean over tokens, and that of a batch
    is made of those of its parts. visits_BE: of all tokens that count in the whole rows, whatever part of them is here.
    """
    share_BE = visits_BE.to(logits_BTE.dtype) / visits_BE.sum(-1, keepdim=True).clamp(min=1)
    each_BT = logits_BTE.shape[-1] * (logits_BTE.softmax(-1) * share_BE[:, None]).sum(-1)
    return mean_over(each_BT, counted_BT)


def router_z_loss(logits_BTE: Tensor, counted_BT: Tensor) -> Tensor:
    """Mean square of the logits' log-sum-exp over the tokens that count, which keeps logits small (Zoph et al. 2022, eq. 5)."""
    return mean_over(logits_BTE.logsumexp(-1).square(), counted_BT)


def mean_over(values_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """The mean of the values that count; zero where none does."""
    return (values_BT * counted_BT).sum() / counted_BT.sum().clamp(min=1)


@torch.no_grad()
def update_correction_bias(router: Router, visits_E: Tensor, rate: float) -> None:
    """Move the bias of experts with fewer visits than the mean up by `rate`, of those with more down (Wang et al. 2024,
    algorithm 1). Once per optimizer step, with the step's visits: gradient accumulation must not repeat it."""
    bias_E = router.correction_bias
    # the sum over all processes lies on the CPU where the device has no float64
    visits_E = visits_E.to(widest_float(bias_E.device)).to(bias_E.device)
    bias_E += rate * torch.sign(visits_E.float().mean() - visits_E)
