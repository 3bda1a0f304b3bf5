"""One step's work as an executor is given it: all new tokens of all sequences, one after the other, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from bessemer.model.adapters import Adapter
from bessemer.model.decoder import Decoder

# Shapes: N new tokens, S sequences, R wanted rows, V vocabulary.


@dataclass
class Batch:
    """Lists on the host; sequence s has the tokens starts[s] : starts[s + 1].

    tables: for each group of layers, of every sequence the block of each `block_size` positions, -1 where it was freed.
    slots: where the states of each sequence lie, in models that have any. wanted: rows, 0 … N - 1, whose logits are asked for.
    drafts: of each sequence, how many of its last tokens are guesses that may be taken back. prompts: how long its prompt
    is. adapters: the low-rank adapter of each, None for the weights as they are. snapshots: of each sequence, in models that
    have states, after which positions its states are saved and under which numbers.
    """

    tokens: list[int]
    positions: list[int]
    starts: list[int]
    tables: list[list[list[int]]]
    slots: list[int]
    wanted: list[int]
    drafts: list[int]
    prompts: list[int]
    adapters: list[Adapter | None]
    snapshots: list[dict[int, int]] = field(default_factory=list)

    @property
    def sequences(self) -> int:
        """Sequences in the batch."""
        return len(self.starts) - 1

    def written(self, group: int, block_size: int) -> tuple[list[int], list[int]]:
        """Of every new token, the block of a group of layers and the place in it that its keys and values go to."""
        blocks, places = [], []
        for sequence, table in enumerate(self.tables[group]):
            for position in self.positions[self.starts[sequence] : self.starts[sequence + 1]]:
                blocks.append(table[position // block_size])
                places.append(position % block_size)
        return blocks, places

    def rows_of_adapters(self) -> list[tuple[Adapter, list[int] | None]]:
        """Each adapter in the batch with its rows; None: all of them."""
        rows: dict[Adapter, list[int]] = {}
        for sequence, adapter in enumerate(self.adapters):
            if adapter is not None:
                rows.setdefault(adapter, []).extend(range(*self.starts[sequence : sequence + 2]))
        return [(adapter, None if len(own) == len(self.tokens) else own) for adapter, own in rows.items()]

    def part(self, chosen: Sequence[int]) -> tuple[Batch, list[int]]:
        """Some sequences of the batch, and the places that their wanted rows have among those of all."""
        part = Batch([], [], [0], [[] for _ in self.tables], [], [], [], [], [])
        places_of = {row: place for place, row in enumerate(self.wanted)}
        places = []
        for sequence in chosen:
            start, end = self.starts[sequence : sequence + 2]
            begin = len(part.tokens)
            part.tokens += self.tokens[start:end]
            part.positions += self.positions[start:end]
            part.starts.append(len(part.tokens))
            for own, tables in zip(part.tables, self.tables, strict=True):
                own.append(tables[sequence])
            part.slots += self.slots[sequence : sequence + 1]
            part.snapshots += self.snapshots[sequence : sequence + 1]
            for row in range(start, end):
                if row in places_of:
                    part.wanted.append(begin + row - start)
                    places.append(places_of[row])
            part.drafts.append(self.drafts[sequence])
            part.prompts.append(self.prompts[sequence])
            part.adapters.append(self.adapters[sequence])
        return part, places

    def alone(self, tile: int) -> Iterator[tuple[int, Batch]]:
        """The same work in pieces that do not depend on each other's company, each with its sequence: prompts cut at
        multiples of `tile`, and one token at a time behind them. No piece has drafts: what they may take back is the caller's.
        """
        wanted = set(self.wanted)
        for sequence in range(self.sequences):
            start, end = self.starts[sequence : sequence + 2]
            prompt = self.prompts[sequence]
            while start < end:
                position = self.positions[start]
                stop = start + 1
                if position < prompt:
                    stop = min(end, start + min(prompt, position - position % tile + tile) - position)
                piece = Batch(
                    self.tokens[start:stop],
                    self.positions[start:stop],
                    [0, stop - start],
                    [[tables[sequence]] for tables in self.tables],
                    self.slots[sequence : sequence + 1],
                    [row - start for row in range(start, stop) if row in wanted],
                    [0],
                    [prompt],
                    [self.adapters[sequence]],
                    self.snapshots[sequence : sequence + 1],
                )
                yield sequence, piece
                start = stop


class Executor(Protocol):
    """Computes batches with one model over its pages."""

    @property
    def model(self) -> Decoder:
        """The model."""

    @property
    def arithmetic(self) -> str:
        """How it computes, in words: by what, in which types."""

    #: Whether it has threads of its own. PyTorch's go on spinning when they have done their part, and take the cores from them.
    own_threads: bool
    #: Whether a row's logits are the same bits whatever else is in the batch, and however a prompt is cut.
    invariant: bool

    def forward(self, batch: Batch) -> Tensor:
        """Logits of the wanted rows in their order, (R, V) float32, where sampling happens; keys are stored in the pages."""

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy blocks: (group, from, to)."""

    def restore_states(self, restored: Sequence[tuple[int, int]]) -> None:
        """Begin with saved states: (snapshot, slot)."""

    def keep_states(self, kept: Sequence[tuple[int, int]]) -> None:
        """Of sequences with drafts, (slot, how many of the new tokens stay): their states go back to after those."""

    def weights_changed(self) -> None:
        """The model's weights are no longer those that were packed."""
