"""A training job to plan: a model, its training settings and a GPU; and a candidate layout of its step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bessemer.distributed.layout import Layout, balanced_stages
from bessemer.model.activations import Recompute, block_activations
from bessemer.model.attention.base import KeyValueShape, variant_of
from bessemer.model.config import ModelConfig
from bessemer.model.costs import all_parts, layer_parts, mtp_parts, outer_parts
from bessemer.model.parts import ModelPart, Numerics, StoredActivations
from bessemer.scaling.hardware import Card
from bessemer.training.config import LoopConfig
from bessemer.training.logit_chunks import ChunkSize, chunk_size

#: Bytes of a weight or a gradient, stored and in FSDP's collectives: float32; and of a matrix that it gathers in bfloat16.
WEIGHT_BYTES, NARROW_BYTES = 4, 2


@dataclass(frozen=True)
class Candidate:
    """A candidate way to run a step: the layout of the ranks, micro-batches, recomputation and pipeline schedule."""

    layout: Layout
    micro_batch_size: int
    recompute: Recompute = "none"
    schedule: str = "1f1b"
    stages_per_rank: int = 1

    @property
    def stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.layout.pipeline * self.stages_per_rank


@dataclass(frozen=True)
class Weights:
    """Parameter counts of a group of tensors, by how the axes shard them. FSDP shards all of them."""

    #: Matrices and parameters of heads: sharded over the tensor axis.
    cut: int = 0
    #: Norms, routers: replicated on the tensor axis.
    whole: int = 0
    #: Experts: sharded over the expert axis and the tensor axis.
    experts: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.cut + other.cut, self.whole + other.whole, self.experts + other.experts)

    def __sub__(self, other: Weights) -> Weights:
        return Weights(self.cut - other.cut, self.whole - other.whole, self.experts - other.experts)

    def in_use(self, layout: Layout) -> float:
        """Parameters on a rank while FSDP has gathered them."""
        return self.cut / layout.tensor + self.whole + self.experts / (layout.tensor * layout.expert)

    def stored(self, layout: Layout) -> float:
        """Parameters that a rank stores."""
        dense = (self.cut / layout.tensor + self.whole) / layout.shard_ranks
        return dense + self.experts / (layout.tensor * layout.shard_ranks)


def _weights(parts: list[ModelPart], count: Callable[[ModelPart], int] = lambda part: part.parameters) -> Weights:
    return sum(
        (
            Weights(
                cut=0 if part.replicated or part.name == "experts" else count(part),
                whole=count(part) if part.replicated else 0,
                experts=count(part) if part.name == "experts" else 0,
            )
            for part in parts
        ),
        Weights(),
    )


def _in_matrices(part: ModelPart) -> int:
    """Parameters of a part of a block in matrices that only products read (`distributed.sharding.product_matrices`)."""
    if part.name == "router":
        return 0
    dims = 3 if part.name == "experts" else 2
    return sum(math.prod(shape) for shape in part.shapes if len(shape) == dims)


@dataclass(frozen=True)
class PlannedJob:
    """A model and its training settings, on one kind of GPU: what a plan is made for."""

    model: ModelConfig
    settings: LoopConfig
    card: Card

    @property
    def compute_bytes(self) -> int:
        """Bytes of a matmul's output element: 4 with dtype float32, else 2."""
        return 4 if self.settings.dtype == "float32" else 2

    @property
    def chunk_size(self) -> ChunkSize:
        """Size of the chunks of logits in the loss."""
        return chunk_size("cpu" if self.on_cpu else "cuda")

    @property
    def on_cpu(self) -> bool:
        """Whether the device is a CPU."""
        return self.card.name == "cpu"

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled; compile: auto counts as true, since a GPU always gains."""
        return self.settings.compile is not False

    def numerics(self, candidate: Candidate) -> Numerics:
        """How activations are stored."""
        return Numerics(self.compute_bytes, self.card.fused_norms, candidate.layout.tensor > 1)

    def micro_batches(self, candidate: Candidate) -> int:
        """Micro-batches of one rank in a step."""
        return -(-self.settings.batch_size // (candidate.layout.data_ranks * candidate.micro_batch_size))

    def tokens(self, candidate: Candidate) -> int:
        """Tokens of one micro-batch on a rank of the context axis, before the tensor axis shards them."""
        return candidate.micro_batch_size * self.settings.context_length // candidate.layout.context

    @cached_property
    def blocks(self) -> list[Weights]:
        """The weights of each block."""
        return [_weights(layer_parts(self.model, layer)) for layer in range(self.model.num_hidden_layers)]

    @property
    def gathers_narrow(self) -> bool:
        """Whether FSDP gathers the matrices of blocks in bfloat16, and the rest of all blocks with what lies outside them."""
        return self.settings.dtype == "bfloat16" and not self.settings.float8

    @cached_property
    def _matrices(self) -> list[Weights]:
        return [_weights(layer_parts(self.model, layer), _in_matrices) for layer in range(self.model.num_hidden_layers)]

    def matrices_of(self, layers: list[int]) -> Weights:
        """The matrices of several blocks that only products read."""
        return sum((self._matrices[layer] for layer in layers), Weights())

    @cached_property
    def outer(self) -> Weights:
        """The weights outside the blocks: embedding, last norm, head, and the multi-token prediction blocks, which FSDP gathers
        with them."""
        mtp = [part for _ in range(self.model.num_nextn_predict_layers) for part in mtp_parts(self.model)]
        return _weights(outer_parts(self.model)) + _weights(mtp)

    def whole_tensors(self, layers: list[int]) -> tuple[int, int]:
        """Tensors of some blocks, and of the rest of the model, that the tensor axis replicates: their count and parameters."""
        parts = [part for layer in layers for part in layer_parts(self.model, layer)] + outer_parts(self.model)
        parts += mtp_parts(self.model) * self.model.num_nextn_predict_layers
        whole = [part for part in parts if part.replicated]
        return sum(len(part.shapes) for part in whole), sum(part.parameters for part in whole)

    @cached_property
    def products(self) -> list[int]:
        """Weights of each block that a token is multiplied with."""
        return [
            sum(part.multiplying for part in layer_parts(self.model, layer)) for layer in range(self.model.num_hidden_layers)
        ]

    @cached_property
    def mtp_products(self) -> int:
        """Weights of the multi-token prediction blocks that a token is multiplied with."""
        return self.model.num_nextn_predict_layers * sum(part.multiplying for part in mtp_parts(self.model))

    @cached_property
    def scores_flops(self) -> float:
        """FLOPs of a token's attention scores, forward and backward, the causal half."""
        products = sum(part.multiplying for part in all_parts(self.model))
        return (self.model.flops_per_token(self.settings.context_length) - 6 * products) / 2

    def kept(self, layer: int, numerics: Numerics, recompute: Recompute = "none") -> StoredActivations:
        """Stored activations of a block for one token (`activations.block_activations`), cached by the kind of block.

        On a CPU no kernel fuses attention whose keys are wider than its values.
        """
        key = (self.model.types[layer], self.model.is_sparse(layer), numerics, recompute)
        if key not in self._kept:
            length = self.settings.context_length
            self._kept[key] = block_activations(self.model, layer, length, numerics, recompute, fused=not self.on_cpu)
        return self._kept[key]

    def training_shapes(self, layers: list[int]) -> list[tuple[KeyValueShape, int]]:
        """Each shape of keys and values among `layers`, with the number of layers that have it."""
        counts = Counter(variant_of(self.model, layer).training_shape(self.model) for layer in layers)
        return [(heads, count) for heads, count in counts.items() if heads is not None]

    def activations_of(self, layers: list[int], numerics: Numerics, recompute: Recompute = "none") -> StoredActivations:
        """Stored activations of several blocks for one token."""
        key = (tuple(layers), numerics, recompute)
        if key not in self._kept:
            self._kept[key] = sum((self.kept(layer, numerics, recompute) for layer in layers), StoredActivations())
        return self._kept[key]

    def blocks_of(self, layers: list[int]) -> Weights:
        """The weights of several blocks."""
        key = tuple(layers)
        if key not in self._sums:
            self._sums[key] = sum((self.blocks[layer] for layer in layers), Weights())
        return self._sums[key]

    @cached_property
    def _kept(self) -> dict[tuple[Any, ...], StoredActivations]:
        return {}

    @cached_property
    def _sums(self) -> dict[tuple[int, ...], Weights]:
        return {}

    def stage_layers(self, stages: int) -> list[range]:
        """The layers of each pipeline stage, balanced by the cost of a token, the head with the last."""
        if stages not in self._stages:
            self._stages[stages] = balanced_stages(self.model, stages)
        return self._stages[stages]

    @cached_property
    def _stages(self) -> dict[int, list[range]]:
        return {}
