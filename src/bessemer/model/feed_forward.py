"""The feed-forward: gated (SwiGLU, Shazeer 2020) or plain."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.config import ModelConfig

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
