"""What a plan is about: a model, the settings that train it, and one way to lay the step out over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bessemer.distributed.balance import balanced_stages
from bessemer.distributed.layout import Layout
from bessemer.model.config import ModelConfig
from bessemer.model.costs import Part, all_parts, flops_per_token, layer_parts, mtp_parts, outer_parts
from bessemer.scaling.activations import Kept, Numerics, Recompute, block_kept
from bessemer.scaling.hardware import Card
from bessemer.training.config import LoopConfig

#: Bytes of a stored weight, a gradient, and what FSDP sends of either: training keeps them in float32.
WEIGHT_BYTES = 4
#: Logits that the loss holds at a time (`training/objectives.py`).
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Choice:
    """One way to run a step: the layout of the ranks, and what does not change the result."""

    layout: Layout
    micro_batch_size: int
    recompute: Recompute = "none"
    schedule: str = "1f1b"
    stages_per_rank: int = 1

    @property
    def stages(self) -> int:
        """Stages of the pipeline, over all ranks."""
        return self.layout.pipeline * self.stages_per_rank


@dataclass(frozen=True)
class Weights:
    """Numbers of a group of tensors, by how the axes cut them. All are cut by FSDP."""

    #: Matrices and what goes with heads: cut by the tensor axis.
    cut: int = 0
    #: Norms, routers: whole on every rank of it.
    whole: int = 0
    #: Of experts: cut by the expert axis, and by the tensor axis inside.
    experts: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.cut + other.cut, self.whole + other.whole, self.experts + other.experts)

    def in_use(self, layout: Layout) -> float:
        """Numbers on a rank while the weights are gathered over FSDP's axis."""
        return self.cut / layout.tensor + self.whole + self.experts / (layout.tensor * layout.expert)

    def stored(self, layout: Layout) -> float:
        """Numbers that a rank keeps."""
        dense = (self.cut / layout.tensor + self.whole) / layout.shard_ranks
        return dense + self.experts / (layout.tensor * layout.shard_ranks)


_REPLICATED = frozenset(
    {
        "router",
        "block norms",
        "final norm",
        "query and key norm",
        "shared expert's gate",
        "multi-token prediction",
        "latents",
        "positions",
    }
)


def _weights(parts: list[Part]) -> Weights:
    return sum(
        (
            Weights(
                cut=0 if part.name in _REPLICATED | {"experts"} else part.parameters,
                whole=part.parameters if part.name in _REPLICATED else 0,
                experts=part.parameters if part.name == "experts" else 0,
            )
            for part in parts
        ),
        Weights(),
    )


@dataclass(frozen=True)
class Work:
    """A model and the settings of the loop that trains it, on one kind of card."""

    model: ModelConfig
    settings: LoopConfig
    card: Card

    @property
    def compute_bytes(self) -> int:
        """Bytes of what products give: float32's where the settings say so, else half of it."""
        return 4 if self.settings.dtype == "float32" else 2

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled; where it is left open, a card of any size gains by it."""
        return self.settings.compile is not False

    def numerics(self, choice: Choice) -> Numerics:
        """How values are kept between the passes."""
        return Numerics(self.compute_bytes, self.card.fused_norms, choice.layout.tensor > 1)

    def micro_batches(self, choice: Choice) -> int:
        """Passes of one rank in a step."""
        return -(-self.settings.batch_size // (choice.layout.data_ranks * choice.micro_batch_size))

    def tokens(self, choice: Choice) -> int:
        """Tokens of one micro-batch that a rank's context holds, before the tensor axis cuts them."""
        return choice.micro_batch_size * self.settings.context_length // choice.layout.context

    @cached_property
    def blocks(self) -> list[Weights]:
        """The weights of every block."""
        return [_weights(layer_parts(self.model, layer)) for layer in range(self.model.num_hidden_layers)]

    @cached_property
    def outer(self) -> Weights:
        """The weights outside the blocks: embedding, last norm, head, and the blocks that predict further ahead, which FSDP
        gathers with them."""
        ahead = [part for _ in range(self.model.num_nextn_predict_layers) for part in mtp_parts(self.model)]
        return _weights(outer_parts(self.model)) + _weights(ahead)

    def whole_tensors(self, layers: list[int]) -> tuple[int, int]:
        """Of some blocks and what is outside of them: how many tensors the tensor axis does not cut, and their numbers."""
        parts = [part for layer in layers for part in layer_parts(self.model, layer)] + outer_parts(self.model)
        parts += mtp_parts(self.model) * self.model.num_nextn_predict_layers
        whole = [part for part in parts if part.name in _REPLICATED]
        return sum(len(part.shapes) for part in whole), sum(part.parameters for part in whole)

    @cached_property
    def products(self) -> list[int]:
        """Weights of every block that a token is multiplied with."""
        return [
            sum(part.multiplying for part in layer_parts(self.model, layer)) for layer in range(self.model.num_hidden_layers)
        ]

    @cached_property
    def products_ahead(self) -> int:
        """The same of the blocks that predict further ahead."""
        return self.model.num_nextn_predict_layers * sum(part.multiplying for part in mtp_parts(self.model))

    @cached_property
    def scores_flops(self) -> float:
        """FLOPs of a token's attention scores, forward and backward: their causal half."""
        products = sum(part.multiplying for part in all_parts(self.model))
        return (flops_per_token(self.model, self.settings.context_length) - 6 * products) / 2

    def kept(self, layer: int, numerics: Numerics, recompute: Recompute = "none") -> Kept:
        """What a block keeps of a token (`activations.block_kept`); blocks of one kind are counted once.

        Latent attention, whose keys are wider than its values, has no kernel on a processor.
        """
        key = (self.model.types[layer], self.model.is_sparse(layer), numerics, recompute)
        if key not in self._kept:
            length, fused = self.settings.context_length, self.card.name != "cpu"
            self._kept[key] = block_kept(self.model, layer, length, numerics, recompute, fused=fused)
        return self._kept[key]

    def kept_by(self, layers: list[int], numerics: Numerics, recompute: Recompute = "none") -> Kept:
        """What some blocks keep of a token together."""
        key = (tuple(layers), numerics, recompute)
        if key not in self._kept:
            self._kept[key] = sum((self.kept(layer, numerics, recompute) for layer in layers), Kept())
        return self._kept[key]

    def blocks_of(self, layers: list[int]) -> Weights:
        """The weights of some blocks together."""
        key = tuple(layers)
        if key not in self._sums:
            self._sums[key] = sum((self.blocks[layer] for layer in layers), Weights())
        return self._sums[key]

    @cached_property
    def _kept(self) -> dict[tuple[Any, ...], Kept]:
        return {}

    @cached_property
    def _sums(self) -> dict[tuple[int, ...], Weights]:
        return {}

    def stage_layers(self, stages: int) -> list[range]:
        """The layers of every stage of a pipeline, balanced by what a token costs, the head with the last."""
        if stages not in self._stages:
            self._stages[stages] = balanced_stages(self.model, stages)
        return self._stages[stages]

    @cached_property
    def _stages(self) -> dict[int, list[range]]:
        return {}
