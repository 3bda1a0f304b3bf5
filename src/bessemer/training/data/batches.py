"""Batches of the training loop, each a pure function of (seed, step).

Shapes: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_value
from bessemer.core.seeds import derive_seed
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.document_sources import DocumentSources
from bessemer.training.data.fim import FillInTheMiddle
from bessemer.training.data.shuffle import permuted

#: Target of a token without a loss.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """Input tokens of one step and their targets.

    targets_BT: the next token's id, or -100 for no loss. positions_BT: where rotary positions restart; None: 0 to T − 1.
    document_ids_BT: tokens attend only to those of an equal id; None: a row is one document. sources_BT: int16, the source of
    each input token's document, an index into `source_names`; None: not known.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None = None
    document_ids_BT: Tensor | None = None
    sources_BT: Tensor | None = None
    source_names: tuple[str, ...] = ()

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
        """The batch of some of its columns, concatenated; they keep their positions."""
        positions_BT = self.positions_BT
        if positions_BT is None:
            positions_BT = torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device).expand(self.tokens_BT.shape)
        whole = replace(self, positions_BT=positions_BT)
        return whole._changed(lambda tensor: torch.cat([tensor[:, part] for part in chosen], dim=1))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


class BatchSource(Protocol):
    """Batches by step: the same batch for the same step, whatever was read before."""

    @property
    def fingerprint(self) -> str:
        """Hash of the data and of its order; a resumed run must have the one it started with."""

    @property
    def batch_size(self) -> int:
        """Rows of the whole batch of a step."""

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0; the others are not read.

        The concatenation of such slices over ranks and micro-batches is the whole batch, however it is split.
        """


def epochs_of_step(step: int, batch_size: int, rows: int) -> np.ndarray:
    """The epoch, counted from 0, of each row of step `step`, when an epoch has `rows` rows: int64 (batch_size,)."""
    return np.arange(step * batch_size, (step + 1) * batch_size) // rows


def rows_of_step(step: int, batch_size: int, rows: int, seed: int) -> np.ndarray:
    """Indices of the rows, of `rows`, that step `step` reads: a new permutation every epoch, epochs without a gap.

    Returns int64 of shape (batch_size,).
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = epochs_of_step(step, batch_size, rows)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        indices[inside] = permuted(positions[inside] % rows, rows, derive_seed(seed, "epoch", int(epoch)))
    return indices


class TokenBatches:
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

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0; the others are not read."""
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
