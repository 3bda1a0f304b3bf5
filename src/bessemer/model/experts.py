"""Mixture of experts: many feed-forwards of which each token visits a few (Shazeer et al. 2017), with no token dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.config import ModelConfig
from bessemer.model.feed_forward import ACTIVATIONS, FeedForward
from bessemer.model.router import Router, Routing, visits

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
    """What the experts make of their visits, (V, D), that lie expert by expert, `sizes_E` of each."""

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

    def forward(self, hidden_ND: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's experts, (N, D)."""
        tokens, chosen = routing.experts_Nk.shape
        by_expert = routing.experts_Nk.flatten().argsort(stable=True)
        # the token of each visit
        source = by_expert // chosen
        visits_VD = self.visited(hidden_ND[source], visits(routing.experts_Nk, self.count))
        weighted_VD = visits_VD * routing.weights_Nk.flatten()[by_expert, None].to(visits_VD.dtype)
        # back in the tokens' order and summed over each token's experts: the same sum whatever the grouping
        ordered_VD = torch.empty_like(weighted_VD).index_copy(0, by_expert, weighted_VD)
        return ordered_VD.unflatten(0, (tokens, chosen)).sum(1)

    def visited(self, visits_VD: Tensor, sizes_E: Tensor) -> Tensor:
        """What the experts make of their visits, (V, D), that lie expert by expert, `sizes_E` of each."""
        weights = ExpertWeights(self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias)
        return self.backend(visits_VD, sizes_E, weights, self.gate)

    def gate(self, inner: Tensor) -> Tensor:
        """What goes into the second product, (…, I), from gate and up, (…, 2 I)."""
        gate, up = inner.chunk(2, dim=-1)
        if self.limit is None:
            return self.activation(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(_CLAMPED_GATE_SLOPE * gate)
