"""Rows of whole documents, none of which sees another; see `packing` for how they are chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bessemer.core.hashing import hash_value
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batches import Batch, epochs_of_step, rows_of_step
from bessemer.training.data.fim import ADDED_TOKENS, FillInTheMiddle
from bessemer.training.data.packing import RowPlan, pack_rows


class DocumentBatches:
    """Batches of packed documents, each with its begin token first and the token that ends it as its last target.

    Every epoch reads the same rows in an order of its own. Of a document that is cut, the parts after the first have no
    begin token, and each learns the first token of the next.
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
        """scratch: where the plan of the rows is kept and mapped; None: in memory. Raises ArtefactError without documents."""
        self._shards, self.batch_size, self._context_length, self._seed = shards, batch_size, context_length, seed
        self._fill_in_the_middle = fill_in_the_middle
        self._plan = RowPlan(
            shards,
            context_length,
            reserved=ADDED_TOKENS if fill_in_the_middle else 0,
            reserved_sources=fill_in_the_middle.sources if fill_in_the_middle else None,
            scratch=scratch,
        )
        self.rows, self.filled = self._plan.rows, self._plan.filled
        self._begin_id = int(shards.read(0, 1)[0])
        changes = [fill_in_the_middle.fingerprint] if fill_in_the_middle else []
        self.fingerprint = hash_value([self._plan.fingerprint, batch_size, seed, *changes])

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0; the others are not read."""
        chosen = rows_of_step(step, self.batch_size, self.rows, self._seed)[rows]
        epochs = epochs_of_step(step, self.batch_size, self.rows)[rows]
        packed: list[list[tuple[np.ndarray, np.ndarray]]] = []
        sources_BT = np.zeros((len(chosen), self._context_length), np.int16)
        for row, (number, epoch) in enumerate(zip(chosen.tolist(), epochs.tolist(), strict=True)):
            starts, lengths, sources = self._plan.row(number)
            places = zip(starts.tolist(), lengths.tolist(), sources.tolist(), strict=True)
            pieces = [self._piece(*place, epoch) for place in places]
            packed.append([(piece[:-1], piece[1:]) for piece in pieces])
            of_tokens = np.repeat(sources, [len(piece) - 1 for piece in pieces])
            sources_BT[row, : len(of_tokens)] = of_tokens
        batch = pack_rows(packed, self._context_length, self._begin_id)
        return replace(batch, sources_BT=torch.from_numpy(sources_BT), source_names=self._shards.sources)

    def _piece(self, start: int, length: int, source: int, epoch: int) -> np.ndarray:
        """A piece's tokens and the one that follows it."""
        tokens = self._shards.read(start, length + 1)
        if self._fill_in_the_middle is None:
            return tokens
        return self._fill_in_the_middle.document(tokens, start, epoch, source)
