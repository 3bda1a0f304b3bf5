"""Batches of the training loop, the sources that give them, and their reading ahead in a thread.

Shapes: B rows of a batch, T tokens of a row, S sequences of a row.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypedDict

import numpy as np
import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.tokenization.shards import TokenShards
from bessemer.training.config_parts import BatchSizes
from bessemer.training.data.token_stream import DocumentSources, FillInTheMiddle, permuted

if TYPE_CHECKING:
    from bessemer.training.model_roles import ModelRoles


#: Target of a token without a loss.
IGNORE_INDEX = -100


class Inputs(TypedDict):
    """Arguments of `Decoder.hidden`."""

    tokens_BT: Tensor
    positions_BT: Tensor | None
    document_ids_BT: Tensor | None
    visible_to_BT: Tensor | None


@dataclass(frozen=True)
class Batch:
    """Input tokens of one step and their targets.

    targets_BT: the next token's id, or -100 for no loss. positions_BT: where rotary positions restart; None: 0 to T − 1.
    document_ids_BT: tokens attend only to those of an equal id; None: a row is one document. sources_BT: int16, the source of
    each input token's document, an index into `source_names`; None: not known.
    visible_to_BT: the last document of the row that sees a token, where documents share what they begin with; None: each sees
    its own.

    A *sequence* is what an objective judges as one: the tokens of a row with one document id, counted from 1 (0 is padding), or
    the whole row where there are no ids. per_token: values of tokens by name, (B, T), such as masks, log-probabilities,
    advantages. per_sequence: values of sequences by name, (B, S, …), that of document id s in column s − 1, such as rewards and
    labels; the columns behind a row's last sequence are not read. sequences: S, the most sequences of a row.
    together: number of neighbouring sequences, as the two answers of a pair, that stay in one micro-batch and on one rank.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None = None
    document_ids_BT: Tensor | None = None
    sources_BT: Tensor | None = None
    visible_to_BT: Tensor | None = None
    source_names: tuple[str, ...] = ()
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    per_sequence: Mapping[str, Tensor] = field(default_factory=dict)
    sequences: int = 1
    together: int = 1

    @property
    def inputs(self) -> Inputs:
        """Arguments of `Decoder.hidden`: `model.hidden(**batch.inputs)`."""
        return Inputs(
            tokens_BT=self.tokens_BT,
            positions_BT=self.positions_BT,
            document_ids_BT=self.document_ids_BT,
            visible_to_BT=self.visible_to_BT,
        )

    @property
    def targets(self) -> int:
        """Number of targets. On a GPU this waits for the device."""
        return int((self.targets_BT != IGNORE_INDEX).sum())

    @property
    def rows_together(self) -> int:
        """Neighbouring rows that stay in one micro-batch: `together` where a row is one sequence. A packed row holds whole
        groups and stands by itself."""
        return self.together if self.document_ids_BT is None else 1

    @property
    def sequence_of_token_BT(self) -> Tensor:  # noqa: N802
        """The column of `per_sequence` of each token, (B, T) int64; of padding, that of the first sequence."""
        if self.document_ids_BT is None:
            return torch.zeros_like(self.tokens_BT)
        return (self.document_ids_BT - 1).clamp(min=0)

    def to(self, device: torch.device) -> Self:
        """The same batch on a device. From pinned memory the copy is asynchronous: the first use waits for it."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """The same batch in pinned memory."""
        return self._changed(Tensor.pin_memory)

    def rows(self, chosen: slice | np.ndarray) -> Self:
        """The batch of some of its rows: a slice, or their indices (B,)."""
        places = chosen if isinstance(chosen, slice) else torch.from_numpy(chosen)
        return self._changed(lambda tensor: tensor[places])

    def columns(self, chosen: Sequence[slice]) -> Self:
        """The batch of some of its columns, concatenated; they keep their positions, and rows their values of sequences."""
        positions_BT = self.positions_BT
        if positions_BT is None:
            positions_BT = torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device).expand(self.tokens_BT.shape)
        whole = replace(self, positions_BT=positions_BT)
        cut = whole._changed(lambda tensor: torch.cat([tensor[:, part] for part in chosen], dim=1), per_sequence=False)
        return replace(cut, per_sequence=self.per_sequence)

    def with_values(
        self, *, per_token: Mapping[str, Tensor] | None = None, per_sequence: Mapping[str, Tensor] | None = None
    ) -> Self:
        """The batch with more values of tokens, (B, T), and of sequences, (B, S, …)."""
        return replace(
            self,
            per_token={**self.per_token, **(per_token or {})},
            per_sequence={**self.per_sequence, **(per_sequence or {})},
        )

    def sequence_sums(self, values_BT: Tensor) -> Tensor:
        """The sum over the tokens of each sequence that are here, (B, S), differentiable. Padding is left out."""
        if self.document_ids_BT is None:
            return values_BT.sum(1, keepdim=True)
        values_BT = values_BT * (self.document_ids_BT > 0)
        sums_BS = values_BT.new_zeros(values_BT.shape[0], self.sequences)
        return sums_BS.scatter_add(1, self.sequence_of_token_BT, values_BT)

    def of_tokens(self, values_BS: Tensor) -> Tensor:
        """The value of each token's sequence, (B, T), differentiable; padding gets that of the first one."""
        return values_BS.gather(1, self.sequence_of_token_BT)

    def _changed(self, change: Callable[[Tensor], Tensor], *, per_sequence: bool = True) -> Self:
        tensors: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        tensors["per_token"] = {name: change(value) for name, value in self.per_token.items()}
        if per_sequence:
            tensors["per_sequence"] = {name: change(value) for name, value in self.per_sequence.items()}
        return replace(self, **tensors)


def concatenated(batches: Sequence[Batch]) -> Batch:
    """The rows of batches of one kind, in order. Values of sequences are filled up to the most sequences with zeros."""
    first, *others = batches
    if not others:
        return first
    sequences = max(batch.sequences for batch in batches)

    def filled(values_BS: Tensor) -> Tensor:
        missing = sequences - values_BS.shape[1]
        return torch.cat([values_BS, values_BS.new_zeros(values_BS.shape[0], missing, *values_BS.shape[2:])], dim=1)

    names = [name for name, value in vars(first).items() if isinstance(value, Tensor)]
    tensors: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    return replace(
        first,
        **tensors,
        sequences=sequences,
        per_token={name: torch.cat([batch.per_token[name] for batch in batches]) for name in first.per_token},
        per_sequence={name: torch.cat([filled(batch.per_sequence[name]) for batch in batches]) for name in first.per_sequence},
    )


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
