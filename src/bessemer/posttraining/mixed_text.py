"""Plain text among conversations: rows of a run's token shards, learnt whole.

A model that learns to answer forgets some of what it was pretrained on. Rows of that text in every batch hold it (as in
Ouyang et al. 2022, section 3.5, where the gradient of pretraining is mixed into tuning).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from bessemer.core.hashing import hash_value
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.posttraining.packing import PackedBatches
from bessemer.training.data.batches import Batch, StatelessBatches, TokenBatches, concatenated


class MixedBatches(StatelessBatches):
    """Batches of packed conversations of which a share of the rows is text, evenly spread over the run."""

    def __init__(self, conversations: PackedBatches, text: TokenBatches, share: float, batch_size: int) -> None:
        """conversations, text: in batches of one row, whose steps are the rows' positions."""
        assert conversations.batch_size == text.batch_size == 1
        self.batch_size = batch_size
        self._conversations = conversations
        self._text = text
        self._share = share
        self.fingerprint = hash_value([conversations.fingerprint, text.fingerprint, share, batch_size])

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        texts_before = np.floor(positions * self._share).astype(np.int64)
        is_text = np.floor((positions + 1) * self._share) > texts_before
        return concatenated(
            [
                _as_packed(self._text.batch(before)) if text else self._conversations.batch(position - before)
                for position, before, text in zip(positions.tolist(), texts_before.tolist(), is_text.tolist(), strict=True)
            ]
        )


def _as_packed(batch: Batch) -> Batch:
    """Rows of text as packed rows of one document each."""
    rows, columns = batch.tokens_BT.shape
    return replace(
        batch,
        positions_BT=torch.arange(columns).expand(rows, columns),
        document_ids_BT=torch.ones_like(batch.tokens_BT),
    )
