"""Attention over pages in one step of the engine: the decoder's cache, by gathered pages or by compiled CPU kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.inference.execution.batch import Batch, StepInputs, padded_tables
from bessemer.inference.execution.kv_cache import PagedMemory, new_slots
from bessemer.model.cpu_kernels import kernels_arithmetic, library
from bessemer.model.cpu_kernels.attention import PagedSequences, PageTensors, paged_attention, write_pages
from bessemer.model.decoder import Decoder
from bessemer.model.layers.attention_mask import AttentionMask, attention_mask
from bessemer.model.layers.cache import AttentionInputs, Rectangle

# Shapes: B sequences, T new tokens of each, N new tokens of all, H query heads, K key-value heads, S positions seen,
# C channels of a head, V of a value head, P blocks.

#: Sequences attend together while the longest has at most this many times the positions of the shortest, and some more.
_ALIKE, _SLACK = 2, 64


class _StateSegment(NamedTuple):
    """Tokens of a sequence that its layers of linear attention read at once, from row `first` on; saved: after how many of them
    its states are kept under which number."""

    first: int
    slot: int
    saved: dict[int, int]


class PagedBatch(ABC):
    """A `Cache` for one forward pass over a batch without padding: the decoder sees one row of N tokens."""

    masked, aligned, real_BT = False, False, None

    def __init__(self, memory: PagedMemory, batch: Batch, inputs: StepInputs) -> None:
        """inputs: copied to the device before `extend`, which begins the pass."""
        self.memory = memory
        self.batch = batch
        self.live = max(batch.positions) + 1
        self._inputs = inputs
        self._positions_1N = inputs.put([batch.positions])
        slots = new_slots(batch)
        self._new_slots_B = inputs.put(slots) if slots else None
        self._rectangles = self._alike() if batch.slots else None

    def extend(self, count: int, real: Sequence[int] | None = None) -> Tensor:
        assert count == len(self.batch.tokens) and real is None
        if self._new_slots_B is not None:
            self.memory.begin_states(self._new_slots_B)
        return self._positions_1N

    @abstractmethod
    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        """As of `Cache`."""

    def rectangles(self) -> list[Rectangle] | None:
        return self._rectangles

    def _alike(self) -> list[Rectangle]:
        """The batch in rectangles. A sequence whose state is saved on the way is cut there, into consecutive segments."""
        segments: dict[tuple[int, int, bool], list[_StateSegment]] = {}
        starts, batch = self.batch.starts, self.batch
        for sequence in range(batch.sequences):
            row, end, drafted = starts[sequence], starts[sequence + 1], batch.drafts[sequence] > 0
            offset = row - batch.positions[row]
            saved = batch.snapshots[sequence] if batch.snapshots else {}
            saved = {position + offset: number for position, number in saved.items() if row < position + offset <= end}
            cuts = [] if drafted else sorted(set(saved) - {end})
            for turn, (first, last) in enumerate(pairwise((row, *cuts, end))):
                numbers = {place - first: number for place, number in saved.items() if first < place <= last}
                segments.setdefault((turn, last - first, drafted), []).append(
                    _StateSegment(first, batch.slots[sequence], numbers)
                )
        # sorted by turn, so that a segment follows the one before it
        return [self._rectangle(count, drafted, alike) for (_, count, drafted), alike in sorted(segments.items())]

    def _rectangle(self, count: int, drafted: bool, segments: Sequence[_StateSegment]) -> Rectangle:
        rows_BT = self._inputs.put([range(segment.first, segment.first + count) for segment in segments])
        slots_B = self._inputs.put([segment.slot for segment in segments])
        saved: dict[int, list[tuple[int, int]]] = {}
        for place, segment in enumerate(segments):
            for after, number in segment.saved.items():
                saved.setdefault(after, []).append((place, number))
        snapshots = {after: self._inputs.put(pairs).T for after, pairs in saved.items()}
        return Rectangle(rows_BT, slots_B, drafted, snapshots)

    def state(self, layer: int, rectangle: Rectangle | None = None) -> tuple[Tensor, ...] | None:
        assert rectangle is not None
        return self.memory.read_state(layer, rectangle.slots_B)

    def store_state(self, layer: int, *state: Tensor, rectangle: Rectangle | None = None, step: int | None = None) -> None:
        assert rectangle is not None
        self.memory.write_state(layer, state, rectangle.slots_B, step)
        after = rectangle.rows_BT.shape[1] if step is None else 1 + step
        if after in rectangle.snapshots:
            places_R, numbers_R = rectangle.snapshots[after]
            self.memory.save_state(layer, state, places_R, numbers_R)


class GatheredAttention:
    """The pages of a sequence are gathered for the model's own attention backend: any model, on any device."""

    arithmetic: Sequence[str] = ()

    def __init__(self, memory: PagedMemory, dtype: torch.dtype) -> None:
        """dtype: the model's."""
        self._memory, self._dtype = memory, dtype

    def cache(self, batch: Batch, inputs: StepInputs) -> GatheredBatch:
        return GatheredBatch(self._memory, batch, inputs, self._dtype)


class _Members(NamedTuple):
    """Sequences that attend together, as far as the host knows them: the rows of their tokens, (B, T), their blocks, the places
    of their queries among the positions that are gathered, and how many of these are each sequence's own, None where all are.

    aligned, seen_until_BT: as in `attention_mask`.
    """

    rows_BT: Tensor
    blocks_BP: Tensor
    slots_BT: Tensor
    positions: int
    lengths_B1: Tensor | None
    aligned: bool
    seen_until_BT: Tensor | None = None


class _AttendingSpan(NamedTuple):
    """Sequences that attend together, and their mask.

    padding_BS: positions that are not a sequence's own; None where there are none. What lies there is another sequence's, and
    may be anything: a number that is not finite would show through a weight of 0.
    """

    members: _Members
    mask: AttentionMask
    padding_BS: Tensor | None


class _GroupWrites(NamedTuple):
    """Where the new tokens of one group of layers go, and who attend together."""

    blocks_N: Tensor
    places_N: Tensor
    members: list[_Members]


class GatheredBatch(PagedBatch):
    """A batch whose pages are gathered layer by layer."""

    def __init__(self, memory: PagedMemory, batch: Batch, inputs: StepInputs, dtype: torch.dtype) -> None:
        super().__init__(memory, batch, inputs)
        self._dtype = dtype
        self._seen_until = batch.seen_until()
        self._groups = [self._group(index) for index in range(len(memory.groups))]
        self._spans: list[list[_AttendingSpan]] = []

    def extend(self, count: int, real: Sequence[int] | None = None) -> Tensor:
        self._spans = [
            [self._span(members, where.window) for members in group.members]
            for group, where in zip(self._groups, self.memory.groups, strict=True)
        ]
        return super().extend(count, real)

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        query_BHTC, key_BKTC, value_BKTV, _, scores, backend = inputs
        index = self.memory.group_of[layer]
        group = self._groups[index]
        self.memory.write(layer, group.blocks_N, group.places_N, key_BKTC[0].transpose(0, 1), value_BKTV[0].transpose(0, 1))
        query_NHC = query_BHTC[0].transpose(0, 1)
        attended_NHV = query_NHC.new_empty((*query_NHC.shape[:2], value_BKTV.shape[-1]))
        for span in self._spans[index]:
            rows_BT, positions = span.members.rows_BT, span.members.positions
            keys_BKSC, values_BKSV = self.memory.read(layer, span.members.blocks_BP, query_NHC.dtype)
            keys_BKSC, values_BKSV = keys_BKSC[:, :, :positions], values_BKSV[:, :, :positions]
            if span.padding_BS is not None:
                padding_BKSC = span.padding_BS[:, None, :, None]
                keys_BKSC, values_BKSV = keys_BKSC.masked_fill(padding_BKSC, 0), values_BKSV.masked_fill(padding_BKSC, 0)
            queries_BHTC = query_NHC[rows_BT].transpose(1, 2)
            attended_BHTV = backend(queries_BHTC, keys_BKSC, values_BKSV, span.mask, scores)
            attended_NHV[rows_BT] = attended_BHTV.transpose(1, 2).to(attended_NHV.dtype)
        return attended_NHV.transpose(0, 1)[None]

    def _group(self, index: int) -> _GroupWrites:
        blocks, places = self.batch.written(index, self.memory.block_size)
        members = [self._members(index, sequences) for sequences in self._together()]
        return _GroupWrites(self._inputs.put(blocks), self._inputs.put(places), members)

    def _together(self) -> list[list[int]]:
        """Sequences that attend together: those with one new token and of similar length; the others each alone."""
        batch = self.batch
        together: list[list[int]] = []
        single = []
        for sequence in range(batch.sequences):
            if batch.starts[sequence + 1] - batch.starts[sequence] > 1:
                together.append([sequence])
            else:
                single.append(sequence)
        single.sort(key=lambda sequence: batch.positions[batch.starts[sequence]])
        shortest = 0
        for sequence in single:
            position = batch.positions[batch.starts[sequence]]
            if not together or len(together[-1]) == 0 or sequence == single[0] or position > _ALIKE * shortest + _SLACK:
                together.append([])
                shortest = position
            together[-1].append(sequence)
        return together

    def _members(self, index: int, sequences: list[int]) -> _Members:
        batch, size, window, inputs = self.batch, self.memory.block_size, self.memory.groups[index].window, self._inputs
        rows, blocks, slots, seen_until = [], [], [], []
        for sequence in sequences:
            start, end = batch.starts[sequence : sequence + 2]
            first = 0 if window is None else max(0, batch.positions[start] - window + 1) // size
            last = batch.positions[end - 1] // size
            rows.append(range(start, end))
            blocks.append(batch.tables[index][sequence][first : last + 1])
            slots.append([position - first * size for position in batch.positions[start:end]])
            seen_until.append([slots[-1][self._seen_until.get(row, row) - start] for row in range(start, end)])
        width = max(len(row) for row in blocks)
        padded = [row + [0] * (width - len(row)) for row in blocks]
        lengths = [row[-1] + 1 for row in slots]
        alike = len(set(lengths)) == 1
        lengths_B1 = None if alike else inputs.put([[length] for length in lengths])
        seen_until_BT = inputs.put(seen_until) if self._seen_until and seen_until != slots else None
        return _Members(inputs.put(rows), inputs.put(padded), inputs.put(slots), max(lengths), lengths_B1, alike, seen_until_BT)

    def _span(self, members: _Members, window: int | None) -> _AttendingSpan:
        """Masks of the members, computed on the device once its numbers have arrived."""
        device = self.memory.device
        mask = attention_mask(
            members.slots_BT.shape[1],
            members.positions,
            self._dtype,
            device,
            slots_BT=members.slots_BT,
            window=window,
            slopes_H=self.memory.slopes_H,
            aligned=members.aligned,
            seen_until_BT=members.seen_until_BT,
        )
        padding_BS = None
        if members.lengths_B1 is not None:
            padding_BS = torch.arange(members.positions, device=device) >= members.lengths_B1
        return _AttendingSpan(members, mask, padding_BS)


class CompiledAttention:
    """The compiled CPU kernels read pages where they lie."""

    def __init__(self, memory: PagedMemory, threads: int, dtype: torch.dtype) -> None:
        """threads: of the kernels. dtype: the model's."""
        self._memory, self._threads, self._dtype = memory, threads, dtype
        self._pages = {layer: PageTensors(*pages) for layer, pages in memory.layers.items()}

    @staticmethod
    def supports(model: Decoder) -> bool:
        """Whether there are compiled CPU kernels that compute the attention of this model."""
        fits = model.device.type == "cpu" and model.dtype != torch.float64 and model.config.position_type != "alibi"
        return fits and library() is not None

    @property
    def arithmetic(self) -> Sequence[str]:
        return [f"attention by compiled kernels ({kernels_arithmetic()})"]

    def cache(self, batch: Batch, inputs: StepInputs) -> PagedBatch:
        if batch.seen_until():
            # the kernels are causal
            return GatheredBatch(self._memory, batch, inputs, self._dtype)
        return CompiledBatch(self._memory, batch, inputs, self._pages, self._threads)


class CompiledBatch(PagedBatch):
    """A batch whose pages the compiled CPU kernels read."""

    def __init__(
        self, memory: PagedMemory, batch: Batch, inputs: StepInputs, pages: Mapping[int, PageTensors], threads: int
    ) -> None:
        super().__init__(memory, batch, inputs)
        self._pages, self._threads = pages, threads
        self._sequences = [PagedSequences.of(batch.starts, batch.positions, *padded_tables(tables)) for tables in batch.tables]

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        query_BHTC, key_BKTC, value_BKTV, _, scores, _ = inputs
        index = self.memory.group_of[layer]
        pages, sequences, window = self._pages[layer], self._sequences[index], self.memory.groups[index].window
        value_NKV = None if self.memory.shape.shared else value_BKTV[0].transpose(0, 1)
        write_pages(pages, sequences, key_BKTC[0].transpose(0, 1), value_NKV)
        attended_NHV = paged_attention(query_BHTC[0].transpose(0, 1), pages, sequences, scores, window, self._threads)
        return attended_NHV.transpose(0, 1)[None].to(query_BHTC.dtype)
