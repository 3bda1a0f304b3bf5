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

    @property
    def batch_size(self) -> int:
        """Rows of the whole batch of a step."""

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0; the others are not read.

        So ranks and micro-batches share out a batch, and its parts in a row are the whole, however it is cut.
        """


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
        self._shards, self.batch_size, self._context_length, self._seed = shards, batch_size, context_length, seed
        self.windows = (shards.tokens - 1) // context_length
        if self.windows < 1:
            raise ArtefactError(
                f"{shards.folder}: its {shards.tokens:,} tokens are fewer than one row of {context_length:,} and the next; "
                "add documents or lower context_length"
            )
        self.fingerprint = hash_value([shards.fingerprint, batch_size, context_length, seed])

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0; the others are not read."""
        length = self._context_length
        chosen = rows_of_step(step, self.batch_size, self.windows, self._seed)[rows]
        windows = np.stack([self._shards.read(int(row) * length, length + 1) for row in chosen]).astype(np.int64)
        return Batch(torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:]))
