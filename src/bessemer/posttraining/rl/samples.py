"""Samples of a policy, and their batches.

Shapes: R samples, B rows, T tokens of a row, S sequences of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bessemer.distributed.layout import Layout
from bessemer.distributed.mesh import ALONE
from bessemer.posttraining.rl.objective import ADVANTAGES, SAMPLER
from bessemer.posttraining.rl.prompts import Prompt
from bessemer.training.data.batches import IGNORE_INDEX, Batch
from bessemer.training.data.packing import best_fit, pack_rows


@dataclass(frozen=True)
class Sample:
    """A completion. ids: of prompt and completion; log_probs: of the completion's tokens, as sampled, an end token among them.
    is_cut: it came to the most tokens, and has not ended. is_own: of each of the ids, whether the policy wrote it; None: all of
    the completion. Others, results of tools for example, are no targets."""

    prompt: Prompt
    ids: Sequence[int]
    prompt_length: int
    log_probs: Sequence[float]
    text: str
    is_cut: bool
    is_own: Sequence[bool] | None = None

    @property
    def places(self) -> np.ndarray:
        """Where among the ids the completion's tokens are."""
        return np.arange(self.prompt_length, len(self.ids)) if self.is_own is None else np.flatnonzero(self.is_own)

    @property
    def completion_ids(self) -> Sequence[int]:
        """The completion's tokens."""
        return [self.ids[place] for place in self.places]

    def example(self, *, is_kept: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets: the completion's tokens, where it is kept."""
        ids = np.asarray(self.ids, np.int64)
        targets = np.full(len(ids) - 1, IGNORE_INDEX, np.int64)
        if is_kept:
            targets[self.places - 1] = ids[self.places]
        return ids[:-1], targets


@dataclass(frozen=True)
class Packed:
    """A batch, and where each sample is in it: rows_R and columns_R, of `per_sequence`; ends_R, the place in its row of the
    last token that it may have a target at."""

    batch: Batch
    rows_R: np.ndarray
    columns_R: np.ndarray
    ends_R: np.ndarray

    @property
    def samples(self) -> int:
        """R."""
        return len(self.rows_R)

    def of_sequences(self, values_R: Tensor) -> Tensor:
        """Values of samples, (R,), as those of sequences, (B, S); zero where there is none."""
        values_BS = values_R.new_zeros(self.batch.tokens_BT.shape[0], self.batch.sequences)
        values_BS[self.rows_R, self.columns_R] = values_R
        return values_BS

    def of_samples(self, values_BS: Tensor) -> Tensor:
        """Values of sequences as those of samples."""
        return values_BS[self.rows_R, self.columns_R]

    def with_advantages(self, advantages_R: Tensor) -> Packed:
        """With one advantage for all tokens of a sample."""
        advantages_BT = self.batch.of_tokens(self.of_sequences(advantages_R))
        return replace(self, batch=self.batch.with_values(per_token={ADVANTAGES: advantages_BT}))

    def at_ends(self, values_R: Tensor) -> Tensor:
        """Values of samples at their last tokens, (B, T); zero elsewhere."""
        values_BT = values_R.new_zeros(self.batch.tokens_BT.shape)
        values_BT[self.rows_R, self.ends_R] = values_R
        return values_BT

    @property
    def target_counts(self) -> Tensor:
        """The number of targets of each sample, (R,)."""
        return self.of_samples(self.batch.sequence_sums((self.batch.targets_BT != IGNORE_INDEX).float()))

    def means(self, values_BT: Tensor) -> Tensor:
        """The mean over each sample's targets of values of tokens, which are zero elsewhere; 0 of a sample without one."""
        return self.of_samples(self.batch.sequence_sums(values_BT)) / self.target_counts.clamp(min=1)


def pack_samples(samples: Sequence[Sample], is_kept: Sequence[bool], padding_id: int, layout: Layout = ALONE.layout) -> Packed:
    """Samples in rows as long as the longest; as many rows as best-fit decreasing finds, and empty ones until a layout's ranks
    have equally many.

    Targets are the completions' tokens; samples that are not kept have none. With the sampler's log-probabilities by token.
    """
    lengths = [len(sample.ids) - 1 for sample in samples]
    capacity = layout.row_length(max(lengths))
    row_of = best_fit(lengths, capacity)
    count = layout.row_count(int(row_of.max()) + 1)
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(count)]
    columns_R, ends_R, filled = np.zeros(len(samples), np.int64), np.zeros(len(samples), np.int64), [0] * count
    sampled_BT = torch.zeros(count, capacity)
    for place, sample in enumerate(samples):
        row = int(row_of[place])
        if is_kept[place]:
            sampled_BT[row, filled[row] + sample.places - 1] = torch.tensor(sample.log_probs)
        columns_R[place] = len(rows[row])
        rows[row].append(sample.example(is_kept=is_kept[place]))
        ends_R[place] = filled[row] + sample.places[-1] - 1
        filled[row] += lengths[place]
    batch = replace(pack_rows(rows, capacity, padding_id), per_token={SAMPLER: sampled_BT}, sequences=max(map(len, rows)))
    if batch.sequences == 1:
        # plain rows are causal, which costs less than a mask of documents
        batch = replace(batch, positions_BT=None, document_ids_BT=None)
    return Packed(batch, row_of, columns_R, ends_R)
