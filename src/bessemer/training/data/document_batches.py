"""Batches of packed documents that do not attend to each other; `packing` plans the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bessemer.core.hashing import hash_value
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batches import Batch, StatelessBatches, epochs_of_step, rows_of_step
from bessemer.training.data.fim import ADDED_TOKENS, FillInTheMiddle
from bessemer.training.data.packing import RowPlan, pack_rows


class DocumentBatches(StatelessBatches):
    """Batches of packed documents, each with its begin token first and its end token as the last target.

    Every epoch reads the same rows in another order. A document that is split into segments has the begin token in the first
    alone, and the last target of a segment is the first token of the next.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        batch_size: int,
        context_length: int,
        seed: int,
        scratch: Path | None = None,
        fill_in_the_middle: FillInTheMiddle | None = None,
    ) -> None:
        """scratch: folder of the memory-mapped row plan; None: in memory. Raises ArtefactError without documents."""
        self.batch_size = batch_size
        self._shards = shards
        self._context_length = context_length
        self._seed = seed
        self._fill_in_the_middle = fill_in_the_middle
        self._plan = RowPlan(
            shards,
            context_length,
            reserved=ADDED_TOKENS if fill_in_the_middle else 0,
            reserved_sources=fill_in_the_middle.sources if fill_in_the_middle else None,
            scratch=scratch,
        )
        self.rows = self._plan.rows
        self.filled = self._plan.filled
        self._begin_id = int(shards.read(0, 1)[0])
        changes = [fill_in_the_middle.fingerprint] if fill_in_the_middle else []
        self.fingerprint = hash_value([self._plan.fingerprint, batch_size, seed, *changes])

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0; the others are not read."""
        chosen = rows_of_step(step, self.batch_size, self.rows, self._seed)[rows]
        epochs = epochs_of_step(step, self.batch_size, self.rows)[rows]
        packed: list[list[tuple[np.ndarray, np.ndarray]]] = []
        sources_BT = np.zeros((len(chosen), self._context_length), np.int16)
        for row, (number, epoch) in enumerate(zip(chosen.tolist(), epochs.tolist(), strict=True)):
            starts, lengths, sources = self._plan.row(number)
            places = zip(starts.tolist(), lengths.tolist(), sources.tolist(), strict=True)
            segments = [self._segment(*place, epoch) for place in places]
            packed.append([(segment[:-1], segment[1:]) for segment in segments])
            token_sources = np.repeat(sources, [len(segment) - 1 for segment in segments])
            sources_BT[row, : len(token_sources)] = token_sources
        batch = pack_rows(packed, self._context_length, self._begin_id)
        return replace(batch, sources_BT=torch.from_numpy(sources_BT), source_names=self._shards.sources)

    def _segment(self, start: int, length: int, source: int, epoch: int) -> np.ndarray:
        """A segment's tokens and the token after it."""
        tokens = self._shards.read(start, length + 1)
        if self._fill_in_the_middle is None:
            return tokens
        return self._fill_in_the_middle.document(tokens, start, epoch, source)
