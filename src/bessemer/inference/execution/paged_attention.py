"""Attention over pages in one step of the engine: the decoder's cache, by gathered pages or by compiled CPU kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.inference.execution.batch import Batch, padded_tables
from bessemer.inference.execution.kv_cache import PagedMemory, new_slots
from bessemer.model.attention_backends import AttentionBackend, Scores
from bessemer.model.attention_mask import AttentionMask, attention_mask
from bessemer.model.cache import Rectangle
from bessemer.model.cpu_kernels.arithmetic import kernels_arithmetic
from bessemer.model.cpu_kernels.attention import PagedSequences, PageTensors, paged_attention, write_pages
from bessemer.model.cpu_kernels.build import library
from bessemer.model.decoder import Decoder

# Shapes: B sequences, T new tokens of each, N new tokens of all, H query heads, K key-value heads, S positions seen,
# C channels of a head, V of a value head, P blocks.

#: Sequences attend together while the longest has at most this many times the positions of the shortest, and some more.
_ALIKE, _SLACK = 2, 64


class _Segment(NamedTuple):
    """Tokens of a sequence that its layers of linear attention read at once, from row `first` on; saved: after how many of them
    its states are kept under which number."""

    first: int
    slot: int
    saved: dict[int, int]


class PagedBatch(ABC):
    """A `Cache` for one forward pass over a batch without padding: the decoder sees one row of N tokens."""

    masked, aligned, real_BT = False, False, None

    def __init__(self, memory: PagedMemory, batch: Batch) -> None:
        self.memory = memory
        self.batch = batch
        self.live = max(batch.positions) + 1
        self._rectangles: list[Rectangle] | None = None
        memory.begin_states(new_slots(batch))

    def extend(self, count: int, real: Sequence[int] | None = None) -> Tensor:
        assert count == len(self.batch.tokens) and real is None
        return torch.tensor([self.batch.positions], device=self.memory.device)

    @abstractmethod
    def attend(
        self,
        layer: int,
        query_BHTC: Tensor,
        key_BKTC: Tensor,
        value_BKTV: Tensor,
        mask: AttentionMask,
        scores: Scores,
        backend: AttentionBackend,
    ) -> Tensor:
        """As of `Cache`."""

    def rectangles(self) -> list[Rectangle] | None:
        if self._rectangles is None:
            self._rectangles = self._alike()
        return self._rectangles

    def _alike(self) -> list[Rectangle]:
        """The batch in rectangles. A sequence whose state is saved on the way is cut there, into consecutive segments."""
        segments: dict[tuple[int, int, bool], list[_Segment]] = {}
        starts, batch = self.batch.starts, self.batch
        for sequence in range(batch.sequences):
            row, end, drafted = starts[sequence], starts[sequence + 1], batch.drafts[sequence] > 0
            offset = row - batch.positions[row]
            saved = batch.snapshots[sequence] if batch.snapshots else {}
            saved = {position + offset: number for position, number in saved.items() if row < position + offset <= end}
            cuts = [] if drafted else sorted(set(saved) - {end})
            for turn, (first, last) in enumerate(pairwise((row, *cuts, end))):
                numbers = {place - first: number for place, number in saved.items() if first < place <= last}
                segments.setdefault((turn, last - first, drafted), []).append(_Segment(first, batch.slots[sequence], numbers))
        # no segment comes before the one that it follows
        return [self._rectangle(count, drafted, alike) for (_, count, drafted), alike in sorted(segments.items())]

    def _rectangle(self, count: int, drafted: bool, segments: Sequence[_Segment]) -> Rectangle:
        device = self.memory.device
        rows_B1 = torch.tensor([segment.first for segment in segments], device=device)[:, None]
        slots_B = torch.tensor([segment.slot for segment in segments], device=device)
        saved: dict[int, list[tuple[int, int]]] = {}
        for place, segment in enumerate(segments):
            for after, number in segment.saved.items():
                saved.setdefault(after, []).append((place, number))
        snapshots = {after: torch.tensor(pairs, device=device).T for after, pairs in saved.items()}
        return Rectangle(rows_B1 + torch.arange(count, device=device), slots_B, drafted, snapshots)

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

    def cache(self, batch: Batch) -> GatheredBatch:
        return GatheredBatch(self._memory, batch, self._dtype)


class _Span(NamedTuple):
    """Sequences that attend together: the rows of their tokens, (B, T), their blocks, and their mask.

    padding_BS: positions that are not a sequence's own; None where there are none. What lies there is another sequence's, and
    may be anything: a number that is not finite would show through a weight of 0.
    """

    rows_BT: Tensor
    blocks_BP: Tensor
    positions: int
    mask: AttentionMask
    padding_BS: Tensor | None


class _Group(NamedTuple):
    """Where the new tokens of one group of layers go, and what they attend to."""

    blocks_N: Tensor
    places_N: Tensor
    spans: list[_Span]


class GatheredBatch(PagedBatch):
    """A batch whose pages are gathered layer by layer."""

    def __init__(self, memory: PagedMemory, batch: Batch, dtype: torch.dtype) -> None:
        super().__init__(memory, batch)
        self._dtype = dtype
        self._groups = [self._group(index) for index in range(len(memory.groups))]

    def attend(
        self,
        layer: int,
        query_BHTC: Tensor,
        key_BKTC: Tensor,
        value_BKTV: Tensor,
        mask: AttentionMask,
        scores: Scores,
        backend: AttentionBackend,
    ) -> Tensor:
        group = self._groups[self.memory.group_of[layer]]
        self.memory.write(layer, group.blocks_N, group.places_N, key_BKTC[0].transpose(0, 1), value_BKTV[0].transpose(0, 1))
        query_NHC = query_BHTC[0].transpose(0, 1)
        attended_NHV = query_NHC.new_empty((*query_NHC.shape[:2], value_BKTV.shape[-1]))
        for span in group.spans:
            keys_BKSC, values_BKSV = self.memory.read(layer, span.blocks_BP, query_NHC.dtype)
            keys_BKSC, values_BKSV = keys_BKSC[:, :, : span.positions], values_BKSV[:, :, : span.positions]
            if span.padding_BS is not None:
                padding_BKSC = span.padding_BS[:, None, :, None]
                keys_BKSC, values_BKSV = keys_BKSC.masked_fill(padding_BKSC, 0), values_BKSV.masked_fill(padding_BKSC, 0)
            queries_BHTC = query_NHC[span.rows_BT].transpose(1, 2)
            attended_BHTV = backend(queries_BHTC, keys_BKSC, values_BKSV, span.mask, scores)
            attended_NHV[span.rows_BT] = attended_BHTV.transpose(1, 2).to(attended_NHV.dtype)
        return attended_NHV.transpose(0, 1)[None]

    def _group(self, index: int) -> _Group:
        batch, device, window = self.batch, self.memory.device, self.memory.groups[index].window
        blocks, places = batch.written(index, self.memory.block_size)
        spans = [self._span(index, members, window) for members in self._together()]
        return _Group(torch.tensor(blocks, device=device), torch.tensor(places, device=device), spans)

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

    def _span(self, index: int, members: list[int], window: int | None) -> _Span:
        batch, size, device = self.batch, self.memory.block_size, self.memory.device
        rows, blocks, slots, longest = [], [], [], 0
        for sequence in members:
            start, end = batch.starts[sequence : sequence + 2]
            first = 0 if window is None else max(0, batch.positions[start] - window + 1) // size
            last = batch.positions[end - 1] // size
            rows.append(list(range(start, end)))
            blocks.append(batch.tables[index][sequence][first : last + 1])
            slots.append([position - first * size for position in batch.positions[start:end]])
            longest = max(longest, slots[-1][-1] + 1)
        width = max(len(row) for row in blocks)
        padded = [row + [0] * (width - len(row)) for row in blocks]
        mask = attention_mask(
            len(slots[0]),
            longest,
            self._dtype,
            device,
            slots_BT=torch.tensor(slots, device=device),
            window=window,
            slopes_H=self.memory.slopes_H,
            aligned=len({row[-1] for row in slots}) == 1,
        )
        lengths_B1 = torch.tensor([[row[-1] + 1] for row in slots], device=device)
        alike = int(lengths_B1.min()) == longest
        padding_BS = None if alike else torch.arange(longest, device=device) >= lengths_B1
        return _Span(torch.tensor(rows, device=device), torch.tensor(padded, device=device), longest, mask, padding_BS)


class CompiledAttention:
    """The compiled CPU kernels read pages where they lie."""

    def __init__(self, memory: PagedMemory, threads: int) -> None:
        """threads: of the kernels."""
        self._memory, self._threads = memory, threads
        self._pages = {layer: PageTensors(*pages) for layer, pages in memory.layers.items()}

    @staticmethod
    def supports(model: Decoder) -> bool:
        """Whether there are compiled CPU kernels that compute the attention of this model."""
        fits = model.device.type == "cpu" and model.dtype != torch.float64 and model.config.position_type != "alibi"
        return fits and library() is not None

    @property
    def arithmetic(self) -> Sequence[str]:
        return [f"attention by compiled kernels ({kernels_arithmetic()})"]

    def cache(self, batch: Batch) -> CompiledBatch:
        return CompiledBatch(self._memory, batch, self._pages, self._threads)


class CompiledBatch(PagedBatch):
    """A batch whose pages the compiled CPU kernels read."""

    def __init__(self, memory: PagedMemory, batch: Batch, pages: Mapping[int, PageTensors], threads: int) -> None:
        super().__init__(memory, batch)
        self._pages, self._threads = pages, threads
        self._sequences = [PagedSequences.of(batch.starts, batch.positions, *padded_tables(tables)) for tables in batch.tables]

    def attend(
        self,
        layer: int,
        query_BHTC: Tensor,
        key_BKTC: Tensor,
        value_BKTV: Tensor,
        mask: AttentionMask,
        scores: Scores,
        backend: AttentionBackend,
    ) -> Tensor:
        index = self.memory.group_of[layer]
        pages, sequences, window = self._pages[layer], self._sequences[index], self.memory.groups[index].window
        value_NKV = None if self.memory.shape.shared else value_BKTV[0].transpose(0, 1)
        write_pages(pages, sequences, key_BKTC[0].transpose(0, 1), value_NKV)
        attended_NHV = paged_attention(query_BHTC[0].transpose(0, 1), pages, sequences, scores, window, self._threads)
        return attended_NHV.transpose(0, 1)[None].to(query_BHTC.dtype)
