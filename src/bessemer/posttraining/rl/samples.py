"""Samples of a policy, and their batches.

Shapes: R samples, B rows, T tokens of a row, S sequences of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bessemer.posttraining.rl.objective import SAMPLER
from bessemer.posttraining.rl.prompts import Prompt
from bessemer.training.data.batches import IGNORE_INDEX, Batch
from bessemer.training.data.packing import best_fit, pack_rows


@dataclass(frozen=True)
class Sample:
    """A completion. ids: of prompt and completion; log_probs: of the completion's tokens, as sampled, an end token among them.
    is_cut: it came to the most tokens, and has not ended."""

    prompt: Prompt
    ids: Sequence[int]
    prompt_length: int
    log_probs: Sequence[float]
    text: str
    is_cut: bool

    @property
    def completion_ids(self) -> Sequence[int]:
        """The completion's tokens."""
        return self.ids[self.prompt_length :]


@dataclass(frozen=True)
class Packed:
    """A batch, and where each sample is in it: rows_R and columns_R, of `per_sequence`."""

    batch: Batch
    rows_R: np.ndarray
    columns_R: np.ndarray

    def of_sequences(self, values_R: Tensor) -> Tensor:
        """Values of samples, (R,), as those of sequences, (B, S); zero where there is none."""
        values_BS = values_R.new_zeros(self.batch.tokens_BT.shape[0], self.batch.sequences)
        values_BS[self.rows_R, self.columns_R] = values_R
        return values_BS

    def of_samples(self, values_BS: Tensor) -> Tensor:
        """Values of sequences as those of samples."""
        return values_BS[self.rows_R, self.columns_R]


def pack_samples(samples: Sequence[Sample], is_kept: Sequence[bool], padding_id: int) -> Packed:
    """Samples in rows as long as the longest; as many rows as best-fit decreasing finds.

    Targets are the completions' tokens; samples that are not kept have none. With the sampler's log-probabilities by token.
    """
    lengths = [len(sample.ids) - 1 for sample in samples]
    capacity = max(lengths)
    row_of = best_fit(lengths, capacity)
    count = int(row_of.max()) + 1
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(count)]
    columns_R, filled = np.zeros(len(samples), np.int64), [0] * count
    sampled_BT = torch.zeros(count, capacity)
    for place, sample in enumerate(samples):
        row = int(row_of[place])
        ids = np.asarray(sample.ids, np.int64)
        targets = np.full(len(ids) - 1, IGNORE_INDEX, np.int64)
        first = sample.prompt_length - 1
        if is_kept[place]:
            targets[first:] = ids[first + 1 :]
            start = filled[row] + first
            sampled_BT[row, start : start + len(sample.log_probs)] = torch.tensor(sample.log_probs)
        columns_R[place] = len(rows[row])
        rows[row].append((ids[:-1], targets))
        filled[row] += lengths[place]
    batch = replace(pack_rows(rows, capacity, padding_id), per_token={SAMPLER: sampled_BT}, sequences=max(map(len, rows)))
    if batch.sequences == 1:
        # plain rows are causal, which costs less than a mask of documents
        batch = replace(batch, positions_BT=None, document_ids_BT=None)
    return Packed(batch, row_of, columns_R)
