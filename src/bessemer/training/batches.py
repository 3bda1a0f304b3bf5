"""What the training loop reads: batches that are a pure function of (seed, step).

Shapes: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_value
from bessemer.core.seeds import derive_seed
from bessemer.tokenization.shards import TokenShards
from bessemer.training.permutation import permuted

#: A target that no loss is taken on.
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Inputs of one step and what the model should say after each.

    targets_BT: the next token's id, or -100 where there is nothing to learn. document_ids_BT: tokens see only those of
    an equal id; None: a row is one document. positions_BT: where rotary positions restart; None: 0 to T − 1.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None = None
    document_ids_BT: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        moved = {name: tensor.to(device) for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **moved)


class Batches(Protocol):
    """A source of batches that gives the same one for the same step, whatever was asked before."""

    @property
    def fingerprint(self) -> str:
        """Hash of the data and of its order; a resumed run must find the one it started with."""

    def batch(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""


def rows_of_step(step: int, batch_size: int, rows: int, seed: int) -> np.ndarray:
    """Which of `rows` rows step `step` reads: every epoch is a permutation of its own, and epochs follow without a gap.

    Returns int64 of shape (batch_size,).
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // rows
    chosen = np.empty_like(places)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        chosen[inside] = permuted(places[inside] % rows, rows, derive_seed(seed, "epoch", int(epoch)))
    return chosen


class TokenBatches:
    """Windows of a stream of tokens, each token a target once an epoch, in a random order of windows."""

    def __init__(self, shards: TokenShards, *, batch_size: int, context_length: int, seed: int) -> None:
        """Raises ArtefactError when the stream is shorter than one window."""
        self._shards, self._batch_size, self._context_length, self._seed = shards, batch_size, context_length, seed
        self.windows = (shards.tokens - 1) // context_length
        if self.windows < 1:
            raise ArtefactError(
                f"{shards.folder}: its {shards.tokens:,} tokens are fewer than one row of {context_length:,} and the next; "
                "add documents or lower context_length"
            )
        self.fingerprint = hash_value([shards.fingerprint, batch_size, context_length, seed])

    def batch(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        length = self._context_length
        rows = rows_of_step(step, self._batch_size, self.windows, self._seed)
        windows = np.stack([self._shards.read(int(row) * length, length + 1) for row in rows]).astype(np.int64)
        return Batch(torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:]))
