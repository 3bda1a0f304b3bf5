"""Backend: the interface between a `Runner` and a device.

A backend gives the matmuls of a model's weights, attention over its pages, and whole steps in one call. For a capture a step
also keeps hidden states, attention weights and choices of experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bessemer.inference.execution.batch import Batch, StepInputs
from bessemer.inference.execution.kv_cache import PagedMemory
from bessemer.inference.sampling.device_sampler import SampledRows
from bessemer.model.decoder import Decoder
from bessemer.model.layers.attention_backends import attention_weights
from bessemer.model.layers.attention_mask import attention_mask
from bessemer.model.layers.cache import AttentionInputs, Cache, Rectangle
from bessemer.model.layers.feed_forward import Routing, SparseFeedForward
from bessemer.model.quantisation.quantised_layers import PackedMatmuls

# Shapes: T tokens, D hidden, H heads, S positions, N rows of a batch, M rows that are kept.


@dataclass
class Observed:
    """Hidden states (M, D) and choices of experts (M, k) with their weights, by layer, of the rows that a batch keeps."""

    states: dict[int, Tensor] = field(default_factory=dict)
    routings: dict[int, Routing] = field(default_factory=dict)

    def take(self, states: Iterable[int], routings: Iterable[int], count: int) -> Observed:
        """Remove and return the first `count` rows of these layers."""
        taken = Observed()
        for layer in states:
            kept_MD = self.states.pop(layer)
            taken.states[layer] = kept_MD[:count]
            if len(kept_MD) > count:
                self.states[layer] = kept_MD[count:]
        for layer in routings:
            experts_Mk, weights_Mk = self.routings[layer]
            taken.routings[layer] = Routing(experts_Mk[:count], weights_Mk[:count])
            self.routings[layer] = Routing(experts_Mk[count:], weights_Mk[count:])
        return taken

    @classmethod
    def joined(cls, parts: Sequence[Observed]) -> Observed:
        """What consecutive parts of a batch kept, in one."""
        states = {
            layer: [part.states[layer] for part in parts if layer in part.states] for part in parts for layer in part.states
        }
        routings = {
            layer: [part.routings[layer] for part in parts if layer in part.routings]
            for part in parts
            for layer in part.routings
        }
        return cls(
            {layer: torch.cat(some) for layer, some in states.items()},
            {layer: Routing(*map(torch.cat, zip(*some, strict=True))) for layer, some in routings.items()},
        )

    def interleaved(self, other: Observed, rows: Mapping[int, Sequence[int]], own: AbstractSet[int]) -> Observed:
        """The hidden states of a batch of which this has the rows `own`, and `other` the rest. rows: of the batch, by layer.

        The choices of experts are the other's.
        """
        states: dict[int, Tensor] = {}
        for layer, of_layer in rows.items():
            is_own_M = torch.tensor([row in own for row in of_layer])
            some = self.states[layer] if layer in self.states else other.states[layer]
            states[layer] = some.new_empty(len(of_layer), some.shape[-1])
            for part, is_part_M in ((self, is_own_M), (other, ~is_own_M)):
                if layer in part.states:
                    states[layer][is_part_M] = part.states[layer]
        return Observed(states, other.routings)


class StatesKeeper:
    """Keeps some rows of the hidden states of a forward pass over one row of N tokens (`Decoder.pre_norm_hidden`)."""

    def __init__(self, rows: Mapping[int, Tensor], kept: dict[int, Tensor]) -> None:
        """rows: the rows to keep of each layer, (M,). kept: receives their states by layer, (M, D) float32."""
        self._rows, self._kept = rows, kept

    def __call__(self, layer: int, hidden_1ND: Tensor) -> None:
        rows_M = self._rows.get(layer)
        if rows_M is not None:
            self._kept[layer] = hidden_1ND[0, rows_M].float()


@contextmanager
def routings_kept(model: Decoder, rows: Mapping[int, Tensor], kept: dict[int, Routing]) -> Iterator[None]:
    """Within it, the choices of experts of some rows of each forward pass are put into `kept`, by layer."""
    with ExitStack() as hooks:
        for layer, of_layer_M in rows.items():
            feed_forward = model.blocks[layer].mlp
            assert isinstance(feed_forward, SparseFeedForward)

            def keep(
                module: nn.Module, inputs: object, routing: Routing, layer: int = layer, of_M: Tensor = of_layer_M
            ) -> None:
                kept[layer] = Routing(routing.experts_Nk[of_M], routing.weights_Nk[of_M].float())

            hooks.callback(feed_forward.router.register_forward_hook(keep).remove)
        yield


class StatelessCache:
    """The part of a `Cache` that is the same where a model has no linear attention."""

    masked, aligned, real_BT = False, False, None

    def rectangles(self) -> list[Rectangle] | None:
        raise AssertionError("linear attention has no pages")

    def state(self, layer: int, rectangle: Rectangle | None = None) -> tuple[Tensor, ...] | None:
        raise AssertionError("linear attention has no pages")

    def store_state(self, layer: int, *state: Tensor, rectangle: Rectangle | None = None, step: int | None = None) -> None:
        raise AssertionError("linear attention has no pages")


class ReadPages(StatelessCache):
    """A `Cache` of one sequence that notes how much some of its positions attend to each, and writes nothing.

    weights_HTS: of the last layer that attended, float32; zero where a query does not see a position.
    """

    def __init__(self, memory: PagedMemory, tables: Sequence[Sequence[int]], positions: Sequence[int]) -> None:
        """tables: the sequence's blocks, of each group of layers. positions: of the queries; their keys are in the pages."""
        self._memory, self._tables, self._positions = memory, tables, positions
        self.live = max(positions) + 1
        self.weights_HTS = torch.empty(0)

    def extend(self, count: int, real: Sequence[int] | None = None) -> Tensor:
        assert count == len(self._positions) and real is None
        return torch.tensor([self._positions], device=self._memory.device)

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        memory, query_BHTC = self._memory, inputs.query_BHTC
        index, size, device = memory.group_of[layer], memory.block_size, memory.device
        window, table = memory.groups[index].window, self._tables[index]
        first = 0 if window is None else max(0, min(self._positions) - window + 1) // size
        blocks_1P = torch.tensor([table[first : (self.live - 1) // size + 1]], device=device)
        length = self.live - first * size
        keys_1KSC = memory.read_keys(layer, blocks_1P, query_BHTC.dtype)[:, :, :length]
        slots_1T = torch.tensor([self._positions], device=device) - first * size
        mask = attention_mask(
            len(self._positions),
            length,
            query_BHTC.dtype,
            device,
            slots_BT=slots_1T,
            window=window,
            slopes_H=memory.slopes_H,
            aligned=False,
        )
        weights_1HTS = attention_weights(query_BHTC, keys_1KSC, mask, inputs.scores)
        self.weights_HTS = nn.functional.pad(weights_1HTS[0].float(), (first * size, 0))
        # only the weights are needed, not the attended values
        return inputs.value_BKTV.new_empty(*query_BHTC.shape[:3], inputs.value_BKTV.shape[-1])


# Shapes: R wanted rows, V vocabulary, S tokens of a row.


class StepContext(NamedTuple):
    """Inputs of a step besides its batch.

    inputs: the buffer of its numbers, copied to the device at once. sampled_R: tokens of the step before, which `Batch.pending`
    refers to. rows: those that are sampled from, whose numbers are copied with the step's.
    """

    inputs: StepInputs
    sampled_R: Tensor
    rows: SampledRows | None = None


class Linear(Protocol):
    """The matmuls of a model's weights in one storage form."""

    @property
    def arithmetic(self) -> Sequence[str]:
        """How it multiplies, in words; empty where the model's modules do."""

    @property
    def matmuls(self) -> PackedMatmuls:
        """Packed matmuls of the layers whose modules do not multiply themselves."""

    @property
    def own_threads(self) -> bool:
        """Whether it has threads of its own. PyTorch's threads spin for a while after their work and take cores from them."""

    def is_soon_done(self, rows: int, *, invariant: bool) -> bool:
        """Whether one thread of PyTorch is enough for its part of a step."""

    def weights_changed(self) -> None:
        """Take the model's weights again, which have changed."""


class Attention(Protocol):
    """Writes a step's keys and values into pages, and attends to them."""

    @property
    def arithmetic(self) -> Sequence[str]:
        """How it computes, in words; empty where PyTorch does."""

    def cache(self, batch: Batch, inputs: StepInputs) -> Cache:
        """The decoder's cache for one forward pass over a batch. It puts its numbers into `inputs`, which are copied before
        the pass."""


class WholeSteps(Protocol):
    """Steps in one call, of the sequences that it can compute."""

    @property
    def arithmetic(self) -> Sequence[str] | None:
        """How it computes, in words; None where that is as the modules do."""

    #: As of `Linear`.
    own_threads: bool
    #: The hidden states that the last batch wanted to keep (`Batch.states`), by layer, a row for each of its rows.
    states: dict[int, Tensor]
    #: Whether a row's logits are the same bits whatever else is in the batch, and however a prompt is cut.
    invariant: bool

    def takes(self, batch: Batch) -> Sequence[int]:
        """The sequences of a batch that it computes: all, some or none."""

    def forward(self, batch: Batch, context: StepContext) -> Tensor:
        """As `Runner.forward`, for a batch of such sequences."""

    def weights_changed(self) -> None:
        """As of `Linear`."""


class TokenGenerator(Protocol):
    """Several tokens of each sequence in one call."""

    def generate(self, batch: Batch, uniforms_RS: Tensor, temperatures_R: Tensor) -> tuple[Tensor, Tensor]:
        """As `Runner.generate`."""


@dataclass(frozen=True)
class Backend:
    """What computes the steps of one model on its device.

    whole: None where every step goes through the model's modules. samples: whether tokens are sampled on the device
    (`Runner.sample`), so that the host schedules the next step while it computes the current one. generator: None where it
    computes one token of a sequence in a call.
    """

    linear: Linear
    attention: Attention
    whole: WholeSteps | None = None
    samples: bool = False
    generator: TokenGenerator | None = None
