"""Sources of the training loop's batches, and their reading ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.tokenization.shards import TokenShards
from bessemer.training.config_parts import BatchSizes
from bessemer.training.data.batch import Batch, concatenated
from bessemer.training.data.token_stream import DocumentSources, FillInTheMiddle, permuted

if TYPE_CHECKING:
    from bessemer.training.model_roles import ModelRoles


class BatchSource(Protocol):
    """Batches by step. A source without state gives the same batch for the same step, whatever was read before."""

    @property
    def fingerprint(self) -> str:
        """Hash of the data and of its order; a resumed run must have the one it started with."""

    @property
    def batch_size(self) -> int:
        """Rows of a whole batch; of growing ones the final number."""

    def batch_size_at(self, step: int) -> int:
        """Rows of the whole batch of `step`."""

    @property
    def lookahead(self) -> int:
        """Steps whose batches may be read before they are needed; 0 for batches that depend on the weights, as those that the
        policy itself makes: they are read by the training thread, after the update of the step before."""

    def bind(self, models: ModelRoles) -> None:
        """Receives the models of the run before the first batch, where batches depend on them."""

    def batch(self, step: int, rows: slice, mesh: Mesh) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0; the others are not read.

        The concatenation of such slices over ranks is the whole batch, however it is split. mesh: for a source whose ranks work
        together on a batch; every rank of the mesh asks for the same steps in the same order.
        """

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values of this data rank on which later batches depend, such as a rollout under way; empty for
        batches that are a function of their step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned on the same data rank."""


class StatelessBatches:
    """Base of sources whose batches are a function of their step, and of one size."""

    batch_size: int
    #: Batches that the prefetcher may hold.
    lookahead = 2

    def batch_size_at(self, step: int) -> int:
        return self.batch_size

    def bind(self, models: ModelRoles) -> None:
        """Needs no model."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accepts nothing."""
        assert not state


def epochs_of_step(step: int, batch_size: int, rows: int) -> np.ndarray:
    """The epoch, counted from 0, of each row of step `step`, when an epoch has `rows` rows: int64 (batch_size,)."""
    return np.arange(step * batch_size, (step + 1) * batch_size) // rows


def rows_of_step(step: int, batch_size: int, rows: int, seed: int) -> np.ndarray:
    """Indices of the rows, of `rows`, that step `step` reads: a new permutation every epoch, epochs without a gap.

    Returns int64 of shape (batch_size,).
    """
    return rows_at(np.arange(step * batch_size, (step + 1) * batch_size), rows, seed)


def rows_at(positions: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Indices of the rows, of `rows`, that are read at these positions of all epochs, counted from 0: int64 of their shape."""
    epochs = positions // rows
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        indices[inside] = permuted(positions[inside] % rows, rows, derive_seed(seed, "epoch", int(epoch)))
    return indices


class TokenBatches(StatelessBatches):
    """Windows of a token stream in random order; each token is a target once an epoch.

    A document attends to those before it in its window. `fill_in_the_middle` rearranges the documents in a window.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        batch_size: int,
        context_length: int,
        seed: int,
        sources: DocumentSources | None = None,
        fill_in_the_middle: FillInTheMiddle | None = None,
    ) -> None:
        """sources: of the shards' documents; with them batches hold `sources_BT`.

        Raises ArtefactError when the stream is shorter than one window.
        """
        self.batch_size = batch_size
        self._shards = shards
        self._context_length = context_length
        self._seed = seed
        self._sources = sources
        self._fill_in_the_middle = fill_in_the_middle
        if fill_in_the_middle and fill_in_the_middle.sources is not None and sources is None:
            assert len(shards.sources) <= 1
        self.rows = (shards.tokens - 1) // context_length
        if self.rows < 1:
            raise ArtefactError(
                f"{shards.folder}: its {shards.tokens:,} tokens are fewer than one row of {context_length:,} and the next "
                "token; add documents or lower context_length"
            )
        changes = [fill_in_the_middle.fingerprint] if fill_in_the_middle else []
        self.fingerprint = hash_value([shards.fingerprint, batch_size, context_length, seed, *changes])

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        length = self._context_length
        starts = rows_of_step(step, self.batch_size, self.rows, self._seed)[rows] * length
        windows = np.empty((len(starts), length + 1), self._shards.dtype)
        for window, start in zip(windows, starts.tolist(), strict=True):
            window[:] = self._shards.read(start, length + 1)
        sources_BT = np.zeros((len(starts), length), np.int16)
        epochs = epochs_of_step(step, self.batch_size, self.rows)[rows]
        for row, (start, epoch) in enumerate(zip(starts.tolist(), epochs.tolist(), strict=True)):
            if self._fill_in_the_middle:
                windows[row], places, lengths = self._fill_in_the_middle.window(windows[row], start, epoch, self._sources)
                if self._sources:
                    sources_BT[row] = np.repeat(self._sources.at(places), lengths)[:-1]
            elif self._sources:
                sources_BT[row] = self._sources.between(start, length)
        tokens = torch.from_numpy(windows.astype(np.int64))
        batch = Batch(tokens[:, :-1], tokens[:, 1:])
        if self._sources is None:
            return batch
        return replace(batch, sources_BT=torch.from_numpy(sources_BT), source_names=self._sources.names)


def read_rows(source: BatchSource, rows: range, mesh: Mesh = ALONE) -> Batch:
    """Rows of a source with batches of one size, counted through all of them: row r is row r mod size of step r // size."""
    size = source.batch_size
    parts = []
    for step in range(rows.start // size, -(-rows.stop // size)):
        begin = step * size
        parts.append(source.batch(step, slice(max(rows.start - begin, 0), min(rows.stop - begin, size)), mesh))
    return concatenated(parts)


class WarmedUpBatches(StatelessBatches):
    """A source's rows in batches of `sizes`."""

    def __init__(self, source: BatchSource, sizes: BatchSizes) -> None:
        """Raises ConfigError for a source whose batches depend on the weights: they are made whole."""
        if not source.lookahead:
            raise ConfigError(
                "batch_size_warmup cuts data that is read into other batches; this method makes its own: leave it out"
            )
        assert source.batch_size == sizes.final
        self.batch_size = sizes.final
        self.lookahead = source.lookahead
        self.fingerprint = hash_value([source.fingerprint, sizes.final, sizes.stages])
        self._source = source
        self._sizes = sizes

    def batch_size_at(self, step: int) -> int:
        return self._sizes.of_step(step)

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        begin = self._sizes.rows_before(step)
        return read_rows(self._source, range(begin, begin + self._sizes.of_step(step))[rows], mesh)


class Prefetcher:
    """Reads the batches of consecutive steps in a thread.

    The batches are the same as without it, since a batch is a pure function of its step. An error in reading is raised where
    the batch is requested. A context manager, whose exit waits for the batch that is being read.
    """

    def __init__(self, read: Callable[[int], Batch], steps: range, *, depth: int = 2, pin: bool = False) -> None:
        """read: the batch of a step. depth: most batches in the queue. pin: copy them to pinned memory."""
        self._read = read
        self._steps = iter(steps)
        self._pin = pin
        self._expected = iter(steps)
        self._free_slots = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._closed.set()
        self._free_slots.release()
        self._thread.join()

    def batch(self, step: int) -> Batch:
        """The batch of the next step, which must be `step`. Raises what reading it raised."""
        expected = next(self._expected)
        assert step == expected, f"step {step} is requested, and {expected} is next"
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        self._free_slots.release()
        return item

    def _run(self) -> None:
        try:
            for step in self._steps:
                self._free_slots.acquire()
                if self._closed.is_set():
                    return
                batch = self._read(step)
                self._ready.put(batch.pinned() if self._pin else batch)
        except BaseException as error:
            # an error of any type is raised again by `batch`, in the training thread
            self._ready.put(error)


class ReadWhenNeeded:
    """Reads each batch when it is requested, in the training thread: for sources whose batches depend on the weights."""

    def __init__(self, read: Callable[[int], Batch]) -> None:
        self._read = read

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        pass

    def batch(self, step: int) -> Batch:
        """The batch of a step. Raises what reading it raised."""
        return self._read(step)
