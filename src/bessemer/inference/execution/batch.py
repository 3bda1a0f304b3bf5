"""One step's input to a runner: the new tokens of all sequences, one after the other, without padding.

A copy to a GPU costs the host the same for four bytes as for thousands, and one from memory that is not pinned waits for the
device. So each part of a step puts its numbers into `StepInputs` first, all are copied together, and the tensors that a part
gets are views of the copy.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bessemer.inference.images import GivenRows, RequestImages
from bessemer.inference.scheduling.sequence import ScheduledChunk
from bessemer.model.adapters import Adapter
from bessemer.model.layers.embedding import EmbeddedRows

# Shapes: N new tokens, S sequences.


class BatchedRequest(Protocol):
    """What a batch reads of a request."""

    adapter: Adapter | None
    images: RequestImages | None

    def wanted_rows(self, chunk: ScheduledChunk) -> range:
        """Which tokens of a chunk, counted from 0, it wants the logits of."""


@dataclass
class Batch:
    """Lists on the host; sequence s has the tokens starts[s] : starts[s + 1].

    tables: for each group of layers, of every sequence the block of each `block_size` positions, -1 where it was freed.
    slots: where the states of each sequence lie, in models that have any. wanted: rows, 0 … N - 1, whose logits are wanted.
    drafts: of each sequence, how many of its last tokens are draft tokens. prompts: how long its prompt is. adapters: the
    low-rank adapter of each, None for the base weights. snapshots: of each sequence, in models that have states, after which
    positions its states are saved and under which numbers.

    states: rows whose hidden states are kept, in rising order, by layer: before layer 0, 1, …, and after the last. routings:
    rows whose choices of experts are kept, by layer. pending: rows whose token was sampled in the step before and is not on the
    host yet, which `tokens` holds a placeholder for; by row, the token's place among those sampled. given: rows that are
    vectors of pictures and not tokens. rope: rows that are turned by positions of three numbers, which are not their places.
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
    states: dict[int, list[int]] = field(default_factory=dict)
    routings: dict[int, list[int]] = field(default_factory=dict)
    pending: dict[int, int] = field(default_factory=dict)
    given: list[GivenRows] = field(default_factory=list)
    rope: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    @classmethod
    def empty(cls, num_groups: int) -> Batch:
        """A batch without sequences, for a model with `num_groups` groups of layers."""
        return cls([], [], [0], [[] for _ in range(num_groups)], [], [], [], [], [])

    def append(self, chunk: ScheduledChunk, request: BatchedRequest) -> slice:
        """Add a scheduled chunk of a request. Returns the places of its wanted rows among those of the batch."""
        sequence = chunk.sequence
        tokens = sequence.tokens[chunk.start : chunk.start + chunk.count - chunk.drafts]
        if chunk.drafts:
            tokens += sequence.draft[: chunk.drafts]
        if request.images is not None:
            begin = len(self.tokens)
            self.given += [part.within(0, chunk.count, begin) for part in request.images.of_chunk(chunk)]
            self.rope |= {begin + row: turn for row, turn in request.images.rope_of_chunk(chunk).items()}
        return self.append_tokens(
            tokens,
            chunk.start,
            sequence.tables,
            wanted=request.wanted_rows(chunk),
            drafts=chunk.drafts,
            prompt_length=sequence.prompt_length,
            adapter=request.adapter,
            slot=sequence.state_slot,
            snapshots=sequence.snapshots,
        )

    def seen_until(self) -> dict[int, int]:
        """The last row that a row sees, of rows that see others behind them, which are of the same sequence."""
        return {
            row: last
            for part in self.given
            if part.is_bidirectional
            for first, last in part.runs()
            for row in range(first, last)
        }

    def turns(self) -> list[list[list[int]]] | None:
        """The positions by which all rows are turned, (3, 1, N); None where those are their places."""
        if not self.rope:
            return None
        rows = [self.rope.get(row, (position,) * 3) for row, position in enumerate(self.positions)]
        return [[list(axis)] for axis in zip(*rows, strict=True)]

    def append_tokens(
        self,
        tokens: Sequence[int],
        position: int,
        tables: Iterable[list[int]],
        *,
        wanted: Iterable[int] = (),
        drafts: int = 0,
        prompt_length: int,
        adapter: Adapter | None = None,
        slot: int | None = None,
        snapshots: dict[int, int] | None = None,
    ) -> slice:
        """Add a sequence's new tokens, the first at `position`. Returns the places of its wanted rows among those of the batch.

        tables: the sequence's block table in each group. wanted: which of these tokens' logits, counted from 0. slot and
        snapshots: in models that have states.
        """
        begin = len(self.tokens)
        before = len(self.wanted)
        self.tokens += tokens
        end = len(self.tokens)
        self.positions += range(position, position + end - begin)
        self.starts.append(end)
        for all_tables, table in zip(self.tables, tables, strict=True):
            all_tables.append(table)
        self.wanted += [begin + row for row in wanted]
        self.drafts.append(drafts)
        self.prompts.append(prompt_length)
        self.adapters.append(adapter)
        if slot is not None:
            self.slots.append(slot)
            self.snapshots.append({} if snapshots is None else snapshots)
        return slice(before, len(self.wanted))

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
        """A batch of the chosen sequences, and the places of its wanted rows among those of the whole batch."""
        part = Batch.empty(len(self.tables))
        places_of = {row: place for place, row in enumerate(self.wanted)}
        places = []
        for sequence in chosen:
            start, end = self.starts[sequence : sequence + 2]
            wanted = [row for row in range(start, end) if row in places_of]
            places += [places_of[row] for row in wanted]
            self._append_to(part, sequence, start, end, wanted, self.drafts[sequence])
        return part, places

    def alone(self, tile: int) -> Iterator[tuple[int, Batch]]:
        """The batch in chunks that do not depend on what else is in it, each with its sequence: prompts cut at multiples of
        `tile`, and one token at a time behind them. No chunk has drafts: the caller keeps what they may take back.
        """
        every_wanted = set(self.wanted)
        for sequence in range(self.sequences):
            start, end = self.starts[sequence : sequence + 2]
            prompt = self.prompts[sequence]
            while start < end:
                position = self.positions[start]
                stop = start + 1
                if position < prompt:
                    stop = min(end, start + min(prompt, position - position % tile + tile) - position)
                chunk = Batch.empty(len(self.tables))
                wanted = [row for row in range(start, stop) if row in every_wanted]
                self._append_to(chunk, sequence, start, stop, wanted, drafts=0)
                yield sequence, chunk
                start = stop

    def _append_to(self, other: Batch, sequence: int, start: int, end: int, wanted: Iterable[int], drafts: int) -> None:
        """Append the tokens start : end of a sequence to another batch."""
        begin = len(other.tokens)
        other.append_tokens(
            self.tokens[start:end],
            self.positions[start],
            [tables[sequence] for tables in self.tables],
            wanted=[row - start for row in wanted],
            drafts=drafts,
            prompt_length=self.prompts[sequence],
            adapter=self.adapters[sequence],
            slot=self.slots[sequence] if self.slots else None,
            snapshots=self.snapshots[sequence] if self.snapshots else None,
        )
        moved = (part.within(start, end, begin - start) for part in self.given)
        other.given += [part for part in moved if part.rows]
        other.rope |= {row - start + begin: turn for row, turn in self.rope.items() if start <= row < end}
        other.pending |= {row - start + begin: place for row, place in self.pending.items() if start <= row < end}
        for kept, of_other in ((self.states, other.states), (self.routings, other.routings)):
            for layer, rows in kept.items():
                of_other.setdefault(layer, []).extend(row - start + begin for row in rows if start <= row < end)


def embedded_rows(given: Sequence[GivenRows], inputs: StepInputs, device: torch.device) -> EmbeddedRows | None:
    """The rows of a batch that are vectors, for a decoder; None where all are tokens. Before the inputs are copied."""
    if not given:
        return None
    rows_M = inputs.put([row for part in given for row in part.rows])
    return EmbeddedRows(rows_M, torch.cat([part.vectors_MD for part in given]).to(device))


def padded_tables(tables: Sequence[Sequence[int]]) -> tuple[array, int]:
    """Block tables of several sequences below each other, padded with -1, and the width of the longest."""
    width = max(map(len, tables))
    numbers = array("i")
    for table in tables:
        numbers.extend(table)
        if len(table) < width:
            numbers.extend([-1] * (width - len(table)))
    return numbers, width


#: Bytes of a buffer, and the alignment of each array in it.
_BUFFER_BYTES = 1 << 20
_ALIGNED = 16

_NUMPY_TYPES = {
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bool: np.bool_,
}


class StepInputs:
    """The numbers of a step, copied to the device at once: `begin`, `put` and `copy`, in this order.

    The tensors that `put` returns hold their numbers from `copy` on, until the next `copy`. The same puts after `begin` give
    the same memory, which captured steps rely on. A step whose numbers are more than a buffer holds takes further buffers, each
    copied at once. On a processor the buffer is the device's memory too, and nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [_Buffer(_BUFFER_BYTES, device)]
        self._current = 0

    def begin(self) -> None:
        """Start a new step. Waits where the host's memory of two steps ago is still being copied."""
        for buffer in self._buffers[: self._current + 1]:
            buffer.begin()
        self._current = 0

    def put(self, numbers: ArrayLike, dtype: torch.dtype = torch.int64) -> Tensor:
        """A tensor on the device for some numbers, of their shape."""
        array: NDArray[np.generic] = np.asarray(numbers, _NUMPY_TYPES[dtype])
        host, tensor = self.reserve(array.shape, dtype)
        host[...] = array
        return tensor

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[NDArray[np.generic], Tensor]:
        """Memory on the host to write numbers into before the copy, with any content, and their tensor on the device."""
        size = prod(shape) * dtype.itemsize
        while not self._buffers[self._current].has_room(size):
            self._current += 1
            if self._current == len(self._buffers):
                self._buffers.append(_Buffer(max(size, _BUFFER_BYTES), self._device))
            self._buffers[self._current].begin()
        return self._buffers[self._current].reserve(shape, dtype, size)

    def copy(self) -> None:
        """Copy what was put. The host does not wait for it."""
        for buffer in self._buffers[: self._current + 1]:
            buffer.copy()


class _Buffer:
    """Memory on the device, and two copies on the host: one is written for a step while that of the step before is copied."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._used, self._turn = size, 0, 0
        if device.type == "cpu":
            self._numbers: list[NDArray[np.generic]] = [np.zeros(size, np.uint8)]
            self._memory = torch.from_numpy(self._numbers[0])
            self._host = [self._memory]
        else:
            hosts = [host_memory(size, device) for _ in range(2)]
            self._numbers = [numbers for numbers, _ in hosts]
            self._host = [memory for _, memory in hosts]
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._copied = [torch.cuda.Event() for _ in self._host] if device.type == "cuda" else []

    def begin(self) -> None:
        self._turn = (self._turn + 1) % len(self._host)
        self._used = 0
        if self._copied:
            self._copied[self._turn].synchronize()

    def has_room(self, size: int) -> bool:
        return self._used + size <= self._size

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> tuple[NDArray[np.generic], Tensor]:
        first, end = self._used, self._used + size
        self._used = min(self._size, end + -end % _ALIGNED)
        host: NDArray[np.generic] = self._numbers[self._turn][first:end].view(_NUMPY_TYPES[dtype]).reshape(shape)
        if self._memory is self._host[0]:
            return host, torch.from_numpy(host)
        return host, self._memory[first:end].view(dtype).view(shape)

    def copy(self) -> None:
        if self._memory is self._host[0]:
            return
        self._memory[: self._used].copy_(self._host[self._turn][: self._used], non_blocking=bool(self._copied))
        if self._copied:
            self._copied[self._turn].record()


class TokensToHost:
    """Sampled tokens on their way to the host, which does not wait until it reads them."""

    def __init__(self, tokens_R: Tensor) -> None:
        """tokens_R: int64. Not to be written before they are read."""
        self._copied = None
        self._tokens_R = tokens_R
        if tokens_R.device.type != "cpu":
            is_cuda = tokens_R.device.type == "cuda"
            self._tokens_R = host_memory(tokens_R.nbytes, tokens_R.device)[1].view(torch.int64)
            self._tokens_R.copy_(tokens_R, non_blocking=is_cuda)
            if is_cuda:
                self._copied = torch.cuda.Event()
                self._copied.record()

    def read(self) -> list[int]:
        """The tokens. Waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tokens_R.tolist()


def fill_pending(tokens_N: Tensor, pending_2P: Tensor | None, sampled_R: Tensor) -> None:
    """Write tokens of the step before, which the host does not know, over their placeholders.

    pending_2P: the rows of placeholders, and the places of their tokens in sampled_R; None: there are none.
    """
    if pending_2P is not None:
        rows_P, places_P = pending_2P
        # below 0 where a row gave no token: its request ends, and this token is not used
        tokens_N.index_copy_(0, rows_P, sampled_R[places_P].clamp(min=0).to(tokens_N.dtype))


def host_memory(size: int, device: torch.device) -> tuple[NDArray[np.generic], Tensor]:
    """Bytes on the host, as an array and as a tensor; pinned for a GPU, so that a copy does not block the host."""
    memory = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return memory.numpy(), memory
