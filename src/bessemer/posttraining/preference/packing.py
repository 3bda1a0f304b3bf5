"""Packing of pairs into rows: a row holds whole pairs, the chosen answer before the rejected one.

What both begin with, their prompt, is in the row once where the model can read it so (Wang and Hegde 2024, "Accelerating direct
preference optimization with prefix sharing").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bessemer.model.folder_config import read_model_config
from bessemer.posttraining.config import Truncate
from bessemer.posttraining.encoding import Encoded, Row, RowCounts, RowFitter, encode_answer
from bessemer.posttraining.formats import Pair
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.config import LoopConfig
from bessemer.training.data.batches import IGNORE_INDEX, Batch
from bessemer.training.data.packing import best_fit, pack_rows


class PairExample(NamedTuple):
    """Both answers of a pair. margin, confidence, weight: as of `Pair`."""

    chosen: Row
    rejected: Row
    margin: float = 0.0
    confidence: float = 1.0
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Of both answers with their prompts."""
        return len(self.chosen[0]) + len(self.rejected[0])

    def without_shared(self) -> tuple[PairExample, int]:
        """The pair without the tokens of the rejected side that both begin with, and their number: neither has a target
        there, and at least one token is left of the rejected side."""
        (chosen, chosen_targets), (rejected, rejected_targets) = self.chosen, self.rejected
        most = min(len(chosen), len(rejected) - 1)
        differs = (
            (chosen[:most] != rejected[:most])
            | (chosen_targets[:most] != IGNORE_INDEX)
            | (rejected_targets[:most] != IGNORE_INDEX)
        )
        shared = int(differs.argmax()) if differs.any() else most
        return self._replace(rejected=(rejected[shared:], rejected_targets[shared:])), shared


@dataclass(frozen=True)
class PackedPairs:
    """Pairs in rows, and what became of the others; equal: those whose answers are the same, left out too.

    Sequences 2k and 2k + 1 of a row, counted from 0, are the chosen and the rejected answer of its k-th pair. `margin` and
    `pair_weight` in `per_sequence` are the pair's; the weight is 0 where there is none. `confidence` is there where any is
    below 1.
    """

    batch: Batch
    pairs: int
    counts: RowCounts
    equal: int

    @property
    def figures(self) -> dict[str, int]:
        """For a stage's metrics."""
        return {**self.counts.figures, "equal": self.equal}

    def sentences(self, of: str) -> list[str]:
        """As `RowCounts.sentences`."""
        equal = [f"  {self.equal:,} of {of} are left out: their two answers are the same"] if self.equal else []
        return [*self.counts.sentences(of), *equal]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.batch.tokens_BT.shape[0]


def pack_pairs(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    context_length: int,
    truncate: Truncate = "drop",
    *,
    example: Callable[[Encoded, int], Row | None] | None = None,
    shares_prompts: bool = False,
) -> PackedPairs:
    """Pairs in few rows. An answer and its prompt take at most half a row; what becomes of longer ones: as of `RowFitter`.
    shares_prompts: as of `pack_examples`. Raises SourceError where longer ones are refused."""
    fitter = RowFitter(context_length // 2, truncate, example)
    packed: list[PairExample] = []
    equal = 0
    for pair in pairs:
        rows = fitter.fit(
            *(partial(encode_answer, pair.prompt, answer, tokenizer, pair.tools) for answer in (pair.chosen, pair.rejected))
        )
        if rows is None:
            continue
        chosen, rejected = rows
        if _are_equal(chosen, rejected):
            equal += 1
        else:
            packed.append(PairExample(chosen, rejected, pair.margin, pair.confidence, pair.weight))
    batch = pack_examples(packed, context_length, tokenizer.bos_id, shares_prompts=shares_prompts)
    return PackedPairs(batch, len(packed), fitter.counts("pairs"), equal)


def _are_equal(first: Row, second: Row) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def can_share_prompts(config: LoopConfig, model: Path) -> bool:
    """As `Trainee.shares_prefixes`, before there is one: of the model in a folder, and the settings of its run."""
    return config.parallel.context == 1 and read_model_config(model).shares_prefixes


def pack_examples(
    pairs: Sequence[PairExample],
    context_length: int,
    padding_id: int,
    row_count: Callable[[int], int] = lambda rows: rows,
    *,
    shares_prompts: bool = False,
) -> Batch:
    """Pairs in few rows of `context_length` tokens, none longer than a row; the batch of `PackedPairs`.

    row_count: from the number of filled rows to the number of rows; the others are empty. shares_prompts: what both answers
    begin with is in the row once, for models that read it so (`ModelConfig.shares_prefixes`); values and gradients are those
    of answers by themselves.
    """
    parts = [pair.without_shared() if shares_prompts else (pair, 0) for pair in pairs]
    lengths = [pair.tokens for pair, _ in parts]
    row_of = best_fit(lengths, context_length)
    rows: list[list[PairExample]] = [[] for _ in range(row_count(int(row_of.max(initial=-1)) + 1))]
    shared: list[list[int]] = [[] for _ in rows]
    for item in sorted(range(len(pairs)), key=lambda item: (-lengths[item], item)):
        pair, before = parts[item]
        rows[row_of[item]].append(pair)
        shared[row_of[item]] += [0, before]
    sequences = 2 * max(map(len, rows), default=1)

    def of_sequences(value: Callable[[PairExample], float]) -> torch.Tensor:
        """A value of each pair, which both of its answers have."""
        values_BS = torch.zeros(len(rows), sequences)
        for row, there in enumerate(rows):
            values_BS[row, : 2 * len(there)] = torch.tensor([value(pair) for pair in there]).repeat_interleave(2)
        return values_BS

    per_sequence = {"pair_weight": of_sequences(lambda pair: pair.weight), "margin": of_sequences(lambda pair: pair.margin)}
    if any(pair.confidence < 1 for pair in pairs):
        per_sequence["confidence"] = of_sequences(lambda pair: pair.confidence)
    examples = [[side for pair in of_row for side in (pair.chosen, pair.rejected)] for of_row in rows]
    return replace(
        pack_rows(examples, context_length, padding_id, shared),
        per_sequence=per_sequence,
        sequences=sequences,
        together=2,
    )
