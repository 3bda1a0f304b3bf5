"""Experts: many feed-forwards of which each token visits a few (Shazeer et al. 2017), with no token dropped."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.config import ModelConfig
from bessemer.model.feed_forward import ACTIVATIONS, FeedForward
from bessemer.model.router import Router, Routing, visits

# Shapes: B batch, T time, D hidden, N tokens, E experts, k experts of a token, I width inside an expert.
_CLAMPED_GATE_SLOPE = 1.702  # gpt-oss's swiglu_alpha


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


class Experts(nn.Module):
    """All experts' matrices, one tensor a kind, so that they can be multiplied in groups."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))  # the gate's rows first
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.gate_up_bias = nn.Parameter(torch.zeros(experts, 2 * inner)) if config.expert_bias else None
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden)) if config.expert_bias else None
        self.activation = ACTIVATIONS[config.hidden_act]
        self.limit = config.swiglu_limit
        self.grouped = True

    def forward(self, hidden_ND: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's experts, (N, D)."""
        tokens, chosen = routing.experts_Nk.shape
        by_expert = routing.experts_Nk.flatten().argsort(stable=True)
        source = by_expert // chosen  # the token of each visit
        sizes_E = visits(routing.experts_Nk, self.gate_up_proj.shape[0])
        multiply = self._grouped if self.grouped else self._loop
        visits_VD = multiply(hidden_ND[source], sizes_E, routing.experts_Nk.flatten()[by_expert])
        weighted_VD = visits_VD * routing.weights_Nk.flatten()[by_expert, None].to(visits_VD.dtype)
        # back in the tokens' order and summed over each token's experts: the same sum whatever the grouping
        ordered_VD = torch.empty_like(weighted_VD).index_copy(0, by_expert, weighted_VD)
        return ordered_VD.unflatten(0, (tokens, chosen)).sum(1)

    def _grouped(self, visits_VD: Tensor, sizes_E: Tensor, experts_V: Tensor) -> Tensor:
        """All experts in two grouped matrix products. Visits lie expert by expert."""
        ends_E = sizes_E.cumsum(0).to(torch.int32)
        inner = self._multiply(visits_VD, self.gate_up_proj, ends_E)
        if self.gate_up_bias is not None:
            inner = inner + self.gate_up_bias[experts_V]
        out = self._multiply(self._gate(inner), self.down_proj, ends_E)
        return out if self.down_bias is None else out + self.down_bias[experts_V]

    @staticmethod
    def _multiply(visits_VD: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
        kind = visits_VD.device.type
        if torch.is_autocast_enabled(kind):  # which knows no grouped product
            visits_VD, weight = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (visits_VD, weight))
        return functional.grouped_mm(visits_VD, weight.transpose(1, 2), offs=ends_E)

    def _loop(self, visits_VD: Tensor, sizes_E: Tensor, experts_V: Tensor) -> Tensor:
        """One expert after the other: the reference."""
        outputs = []
        for expert, tokens in enumerate(visits_VD.split(sizes_E.tolist())):
            biases = (None, None) if self.gate_up_bias is None else (self.gate_up_bias[expert], self.down_bias[expert])  # type: ignore[index]
            inner = functional.linear(tokens, self.gate_up_proj[expert], biases[0])
            outputs.append(functional.linear(self._gate(inner), self.down_proj[expert], biases[1]))
        return torch.cat(outputs)

    def _gate(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, dim=-1)
        if self.limit is None:
            return self.activation(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(_CLAMPED_GATE_SLOPE * gate)
