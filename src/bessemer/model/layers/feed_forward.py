"""Feed-forward layers: gated (SwiGLU, Shazeer 2020), plain, and a mixture of experts.

In a mixture of experts (Shazeer et al. 2017) the router sends each token to a few of many feed-forwards and balances their
load. No token is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.config import ModelConfig
from bessemer.model.device import widest_float

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": lambda hidden: functional.gelu(hidden, approximate="tanh"),
    "gelu_pytorch_tanh": lambda hidden: functional.gelu(hidden, approximate="tanh"),
    "relu": functional.relu,
}


class FeedForward(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate, at every position alone."""

    def __init__(self, config: ModelConfig, intermediate_size: int | None = None) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, intermediate_size or config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Returns (B, T, D)."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(hidden_BTD)))
        return self.down_proj(self.activation(self.gate_proj(hidden_BTD)) * self.up_proj(hidden_BTD))


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


# Shapes: B batch, T time, D hidden, N tokens, V visits (N k), E experts, k experts of a token, I width inside an expert.
# gpt-oss's swiglu_alpha
_CLAMPED_GATE_SLOPE = 1.702


class SparseFeedForward(nn.Module):
    """Router, experts, and the expert that every token visits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = FeedForward(config, shared) if shared else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Returns (B, T, D)."""
        hidden_ND = hidden_BTD.flatten(0, -2)
        return self.visit(hidden_ND, self.router(hidden_ND)).view(hidden_BTD.shape)

    def visit(self, hidden_ND: Tensor, routing: Routing) -> Tensor:
        """What the chosen experts, and the one that every token visits, make of the tokens, (N, D)."""
        out_ND = self.experts(hidden_ND, routing)
        if self.shared_expert is not None:
            shared_ND = self.shared_expert(hidden_ND)
            if self.shared_expert_gate is not None:
                shared_ND = shared_ND * torch.sigmoid(self.shared_expert_gate(hidden_ND))
            out_ND = out_ND + shared_ND
        return out_ND


class ExpertWeights(NamedTuple):
    """The matrices of all experts, one tensor a kind, so that they can be multiplied in groups: (E, 2 I, D), the gate's rows
    first, and (E, D, I), and biases (E, 2 I) and (E, D) where there are any."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


#: From what lies between the two products of an expert, gate and up side by side, to what goes into the second.
Gate = Callable[[Tensor], Tensor]


class ExpertBackend(Protocol):
    """Outputs of the experts for their visits, (V, D), sorted by expert, `sizes_E` of each."""

    def __call__(self, visits_VD: Tensor, sizes_E: Tensor, weights: ExpertWeights, gate: Gate) -> Tensor: ...


def grouped(visits_VD: Tensor, sizes_E: Tensor, weights: ExpertWeights, gate: Gate) -> Tensor:
    """All experts in two grouped matrix products; one after the other where PyTorch has none, in float64 and of no visits."""
    kind = visits_VD.device.type
    # which knows no grouped product
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        visits_VD = visits_VD.to(dtype)
        weights = weights._replace(gate_up=weights.gate_up.to(dtype), down=weights.down.to(dtype))
    if visits_VD.dtype == torch.float64 or not len(visits_VD):
        return one_by_one(visits_VD, sizes_E, weights, gate)
    ends_E = sizes_E.cumsum(0).to(torch.int32)
    inner = functional.grouped_mm(visits_VD, weights.gate_up.transpose(1, 2), offs=ends_E)
    if weights.gate_up_bias is None or weights.down_bias is None:
        return functional.grouped_mm(gate(inner), weights.down.transpose(1, 2), offs=ends_E)
    expert_V = torch.arange(len(sizes_E), device=sizes_E.device).repeat_interleave(sizes_E, output_size=len(visits_VD))
    between = gate(inner + weights.gate_up_bias[expert_V]).to(visits_VD.dtype)
    return functional.grouped_mm(between, weights.down.transpose(1, 2), offs=ends_E) + weights.down_bias[expert_V]


def one_by_one(visits_VD: Tensor, sizes_E: Tensor, weights: ExpertWeights, gate: Gate) -> Tensor:
    """One expert after the other: the reference."""
    outputs = []
    for expert, tokens in enumerate(visits_VD.split(sizes_E.tolist())):
        gate_up_bias, down_bias = (bias if bias is None else bias[expert] for bias in weights[2:])
        inner = functional.linear(tokens, weights.gate_up[expert], gate_up_bias)
        outputs.append(functional.linear(gate(inner), weights.down[expert], down_bias))
    return torch.cat(outputs)


class Experts(nn.Module):
    """All experts and the way of the tokens to them and back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.backend: ExpertBackend = grouped
        self.count = experts
        # the gate's rows first
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.gate_up_bias = nn.Parameter(torch.zeros(experts, 2 * inner)) if config.expert_bias else None
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden)) if config.expert_bias else None
        self.activation = ACTIVATIONS[config.hidden_act]
        self.limit = config.swiglu_limit
        self.weighs_inputs = config.expert_input_scores

    def forward(self, hidden_ND: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's experts, (N, D)."""
        tokens, chosen = routing.experts_Nk.shape
        by_expert = routing.experts_Nk.flatten().argsort(stable=True)
        # the token of each visit
        source = by_expert // chosen
        weights_V1 = routing.weights_Nk.flatten()[by_expert, None]
        visits_VD, sizes_E = hidden_ND[source], visits(routing.experts_Nk, self.count)
        if self.weighs_inputs:
            weighted_VD = self.visited(visits_VD * weights_V1.to(visits_VD.dtype), sizes_E)
        else:
            outputs_VD = self.visited(visits_VD, sizes_E)
            weighted_VD = outputs_VD * weights_V1.to(outputs_VD.dtype)
        # back in the tokens' order and summed over each token's experts: the same sum whatever the grouping
        ordered_VD = torch.empty_like(weighted_VD).index_copy(0, by_expert, weighted_VD)
        return ordered_VD.unflatten(0, (tokens, chosen)).sum(1)

    def visited(self, visits_VD: Tensor, sizes_E: Tensor) -> Tensor:
        """Outputs of the experts for their visits, (V, D), sorted by expert, `sizes_E` of each."""
        weights = ExpertWeights(self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias)
        return self.backend(visits_VD, sizes_E, weights, self.gate)

    def gate(self, inner: Tensor) -> Tensor:
        """What goes into the second product, (…, I), from gate and up, (…, 2 I)."""
        gate, up = inner.chunk(2, dim=-1)
        if self.limit is None:
            return self.activation(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(_CLAMPED_GATE_SLOPE * gate)
