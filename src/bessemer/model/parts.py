"""Parts of a decoder as figures: tensors of one kind, and what a forward pass stores of them. Imports no PyTorch.

Activations are counted as Korthikanti et al. 2022 do: each input that a backward formula needs, once a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from bessemer.model.architecture import DecoderShape

Shape = tuple[int, ...]

#: Bytes of float32: the residual stream, norms, the router, the states of linear attention.
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ModelPart:
    """Tensors of one kind: where they stand in the network, their shapes, and the share of them that one token meets.

    replicated: whether the tensor axis replicates them; it shards the others.
    """

    name: str
    shapes: tuple[Shape, ...]
    active_share: float = 1.0
    replicated: bool = False

    @property
    def parameters(self) -> int:
        """Stored numbers."""
        return sum(map(prod, self.shapes))

    @property
    def multiplying(self) -> int:
        """Numbers that a token is multiplied with in matrices."""
        return round(self.active_share * sum(prod(shape) for shape in self.shapes if len(shape) > 1))


@dataclass(frozen=True)
class StoredActivations:
    """Bytes per token, by how the tensor axis shards them.

    sequence: residual stream and norms, sharded by tokens. heads: sharded by heads or inner channels. inputs: of matmuls, for
    all tokens, replicated on the tensor axis.
    """

    sequence: float = 0.0
    heads: float = 0.0
    inputs: float = 0.0

    def __add__(self, other: StoredActivations) -> StoredActivations:
        return StoredActivations(self.sequence + other.sequence, self.heads + other.heads, self.inputs + other.inputs)

    def per_token(self, tensor: int = 1) -> float:
        """Bytes per token on a rank of the context axis, with `tensor` ranks of the tensor axis."""
        return (self.sequence + self.heads) / tensor + self.inputs


@dataclass(frozen=True)
class Numerics:
    """How activations are stored: bytes of a matmul's output (2 under autocast, else 4), and whether norms are one kernel."""

    compute: int = 2
    fused_norms: bool = True
    #: Whether modules read tokens gathered over the tensor axis in autocast's dtype, so that one copy serves all matmuls.
    gathered: bool = False

    @property
    def autocast(self) -> bool:
        """Whether matmuls run in a smaller dtype than that of the weights."""
        return self.compute != FLOAT32_BYTES

    def norm_bytes(self, model: DecoderShape, width: int, *, rows: int = 1) -> float:
        """A norm of `width` channels, `rows` of them a token: its input, its sums, and when unfused its unscaled output."""
        sums = (2 if model.norm_type == "layer" else 1) * rows
        unscaled = 0 if self.fused_norms or model.norm_type == "layer" else width
        return FLOAT32_BYTES * (width + sums + unscaled)

    def matmul_inputs(self, model: DecoderShape, matmuls: int) -> StoredActivations:
        """Stored inputs of `matmuls` that read the same hidden states: one tensor, or under autocast a copy each."""
        width = model.hidden_size
        if self.autocast:
            return StoredActivations(inputs=(1 if self.gathered else matmuls) * width * self.compute)
        # the output of a norm, or else the residual stream, which nothing else stores
        return StoredActivations(inputs=width * FLOAT32_BYTES)
