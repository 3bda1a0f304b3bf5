"""Capture: hidden states, attention weights and choices of experts of a request's tokens, kept from the steps of the engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bessemer.core.errors import RequestError
from bessemer.inference.execution.backend import Observed
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.runner import Runner
from bessemer.inference.scheduling.sequence import ScheduledChunk, TokenSequence
from bessemer.model.adapters import Adapter
from bessemer.model.attention.base import variant_of
from bessemer.model.config import ModelConfig

# Shapes: P captured positions, D hidden, S positions attended to, k experts of a token.

#: Attention weights, of all heads, that are computed at a time.
_MOST_WEIGHTS = 1 << 24

Positions = Literal["all", "prompt", "last", "generated"]
Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class Capture:
    """What is kept of which tokens.

    states: layers before which the hidden states are kept: 0 for the embeddings, the number of layers for what leaves the last
    one, before the last norm. attention: (layer, head) whose weights over all positions are kept. routing: layers whose
    choices of experts are kept. positions: all tokens that are computed, those of the prompt, its last, those generated, or
    some by number. The last token of a completion is never computed.
    """

    states: tuple[int, ...] = ()
    attention: tuple[tuple[int, int], ...] = ()
    routing: tuple[int, ...] = ()
    positions: Positions | tuple[int, ...] = "all"

    def check(self, config: ModelConfig, *, shared: bool) -> None:
        """Raises RequestError for what the model does not have, or what a model shared by several processes cannot give."""
        layers = config.num_hidden_layers
        for layer in self.states:
            if not 0 <= layer <= layers:
                raise RequestError(f"capture: hidden states are those before layer 0 … {layers - 1} or after all ({layers})")
        for layer, head in self.attention:
            if not 0 <= layer < layers or not 0 <= head < config.num_attention_heads:
                raise RequestError(
                    f"capture: attention ({layer}, {head}) is not of {layers} layers of {config.num_attention_heads} heads"
                )
            if variant_of(config, layer).recurrent:
                raise RequestError(f"capture: layer {layer} has linear attention, which has no weights")
        for layer in self.routing:
            if not 0 <= layer < layers or not config.is_sparse(layer):
                raise RequestError(f"capture: layer {layer} has no experts to choose")
        if shared and (self.attention or self.routing):
            raise RequestError("capture: of a model that several processes share there are hidden states only")
        if not isinstance(self.positions, str) and not all(position >= 0 for position in self.positions):
            raise RequestError("capture: positions are counted from 0")
        if not isinstance(self.positions, str) and not self.positions:
            raise RequestError("capture: name at least one position")

    def first(self, prompt_length: int) -> int:
        """The first position that is kept: tokens from there on are computed, and not found in the prefix cache."""
        if isinstance(self.positions, str):
            return {"all": 0, "prompt": 0, "last": prompt_length - 1, "generated": prompt_length}[self.positions]
        return min(self.positions)

    def chosen(self, positions: range, prompt_length: int) -> list[int]:
        """Which of these positions are captured."""
        if self.positions == "all":
            return list(positions)
        if isinstance(self.positions, str):
            end = positions.stop if self.positions == "generated" else prompt_length
            return list(range(max(positions.start, self.first(prompt_length)), min(positions.stop, end)))
        return sorted(position for position in set(self.positions) if position in positions)

    @property
    def attention_layers(self) -> list[int]:
        """Layers of which attention weights are kept."""
        return list(dict.fromkeys(layer for layer, _ in self.attention))

    @property
    def needed_states(self) -> frozenset[int]:
        """Layers before which hidden states are needed: attention weights are computed from them."""
        return frozenset(self.states) | frozenset(self.attention_layers)


@dataclass(frozen=True)
class Captured:
    """What was kept, a row for each of `positions`.

    states: (P, D) float32 by layer. attention: (P, S) float32 by (layer, head), zero where a position is not seen. experts and
    expert_weights: (P, k) by layer, the likeliest expert first.
    """

    positions: list[int]
    states: dict[int, Tensor]
    attention: dict[tuple[int, int], Tensor]
    experts: dict[int, Tensor]
    expert_weights: dict[int, Tensor]


class _CapturedChunk(NamedTuple):
    """Captured rows of one chunk. states: before each needed layer. attention: of layers whose keys do not stay."""

    positions: list[int]
    states: dict[int, Tensor]
    attention: dict[tuple[int, int], list[Tensor]]
    experts: dict[int, Tensor]
    expert_weights: dict[int, Tensor]


class Recorder:
    """Collects what a request captures, chunk by chunk. What is kept of a token is replaced where it is computed again: after a
    preemption or a rejected draft.

    Attention weights are computed from hidden states and the keys in the pages: of layers that see all positions once for all
    tokens, before the keys are released, so that steps take no longer; of layers with a window chunk by chunk.
    """

    def __init__(
        self, capture: Capture, prompt_length: int, turn_of: Callable[[int], tuple[int, int, int]] | None = None
    ) -> None:
        """turn_of: the position of three numbers by which the token at a place is turned; None: it is the place."""
        self._turn_of = turn_of
        self._capture = capture
        self._prompt_length = prompt_length
        self._chunks: list[_CapturedChunk] = []
        self._attention: dict[tuple[int, int], list[Tensor]] = {}

    def positions(self, chunk: ScheduledChunk) -> list[int]:
        """The positions of a chunk that are kept."""
        return self._capture.chosen(range(chunk.start, chunk.start + chunk.count), self._prompt_length)

    def mark_rows(self, chunk: ScheduledChunk, batch: Batch) -> None:
        """Ask the batch to keep the captured rows of its last chunk."""
        begin = batch.starts[-2] - chunk.start
        rows = [begin + position for position in self.positions(chunk)]
        if not rows:
            return
        for layer in self._capture.needed_states:
            batch.states.setdefault(layer, []).extend(rows)
        for layer in self._capture.routing:
            batch.routings.setdefault(layer, []).extend(rows)

    def collect(self, chunk: ScheduledChunk, observed: Observed, runner: Runner, adapter: Adapter | None) -> None:
        """Take the rows of a chunk out of what a step kept. The chunk's keys are still in the pages."""
        positions, capture = self.positions(chunk), self._capture
        if not positions:
            return
        part = observed.take(capture.needed_states, capture.routing, len(positions))
        attention: dict[tuple[int, int], list[Tensor]] = {}
        for layer in capture.attention_layers:
            if runner.memory.window_of(layer) is not None:
                attention |= self._weights(layer, part.states[layer], positions, chunk.sequence, runner, adapter)
        experts = {layer: routing.experts_Nk for layer, routing in part.routings.items()}
        expert_weights = {layer: routing.weights_Nk for layer, routing in part.routings.items()}
        self._chunks.append(_CapturedChunk(positions, part.states, attention, experts, expert_weights))

    def complete(self, sequence: TokenSequence, runner: Runner, adapter: Adapter | None) -> None:
        """Compute the remaining attention weights, before the sequence releases its pages."""
        places = self._places(sequence.computed)
        if not places:
            return
        for layer in self._capture.attention_layers:
            if runner.memory.window_of(layer) is None:
                states_PD = self._rows([chunk.states for chunk in self._chunks], layer, places.values())
                self._attention |= self._weights(layer, states_PD, list(places), sequence, runner, adapter)

    def captured(self, end: int) -> Captured:
        """What was captured at positions before `end`; attention weights once `complete` has been called."""
        places, capture = self._places(end), self._capture
        attention = {}
        for pair in capture.attention:
            of_each = self._attention.get(pair)
            if of_each is None:
                of_each = [
                    self._chunks[number].attention[pair][row]
                    for number, row in places.values()
                    if pair in self._chunks[number].attention
                ]
            length = max(map(len, of_each), default=0)
            attention[pair] = torch.zeros(len(of_each), length)
            for row, weights_S in zip(attention[pair], of_each, strict=True):
                row[: len(weights_S)] = weights_S
        return Captured(
            list(places),
            {layer: self._rows([chunk.states for chunk in self._chunks], layer, places.values()) for layer in capture.states},
            attention,
            {layer: self._rows([chunk.experts for chunk in self._chunks], layer, places.values()) for layer in capture.routing},
            {
                layer: self._rows([chunk.expert_weights for chunk in self._chunks], layer, places.values())
                for layer in capture.routing
            },
        )

    def _places(self, end: int) -> dict[int, tuple[int, int]]:
        """Piece and row of each position before `end` that was kept, in order; of one kept twice the later."""
        places = {
            position: (number, row)
            for number, chunk in enumerate(self._chunks)
            for row, position in enumerate(chunk.positions)
            if position < end
        }
        return dict(sorted(places.items()))

    @staticmethod
    def _rows(chunks: Sequence[Mapping[int, Tensor]], layer: int, places: Collection[tuple[int, int]]) -> Tensor:
        return torch.stack([chunks[number][layer][row] for number, row in places]) if places else torch.empty(0)

    def _weights(
        self,
        layer: int,
        states_PD: Tensor,
        positions: Sequence[int],
        sequence: TokenSequence,
        runner: Runner,
        adapter: Adapter | None,
    ) -> dict[tuple[int, int], list[Tensor]]:
        """The weights of the heads of a layer that are captured, for each position."""
        heads = [head for of, head in self._capture.attention if of == layer]
        at_once = max(1, _MOST_WEIGHTS // (runner.model.config.num_attention_heads * (positions[-1] + 1)))
        of_heads: dict[tuple[int, int], list[Tensor]] = {(layer, head): [] for head in heads}
        for start in range(0, len(positions), at_once):
            part = slice(start, start + at_once)
            turns = None if self._turn_of is None else [self._turn_of(position) for position in positions[part]]
            weights_HPS = runner.attention_weights(layer, states_PD[part], positions[part], sequence.tables, adapter, turns)
            for head in heads:
                of_heads[layer, head] += weights_HPS[head].clone()
        return of_heads


@torch.inference_mode()
def embeddings(states: Sequence[Tensor], norm: Callable[[Tensor], Tensor] | None, *, normalise: bool) -> Tensor:
    """The mean of each text's states (P, D), after a norm, as one vector a text, (texts, D) float32; normalise: of length 1."""
    pooled = [(states_PD if norm is None else norm(states_PD)).mean(0) for states_PD in states]
    vectors = torch.stack(pooled) if pooled else torch.empty(0)
    return nn.functional.normalize(vectors, dim=-1) if normalise else vectors
