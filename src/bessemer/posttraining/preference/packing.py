"""Packing of pairs into rows: a row holds whole pairs, the chosen answer before the rejected one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from bessemer.posttraining.encoding import Encoded, encode_answer
from bessemer.posttraining.formats import Pair
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import Batch
from bessemer.training.data.packing import best_fit, pack_rows

#: Inputs and targets of an answer with its prompt.
_Example = tuple[np.ndarray, np.ndarray]


class PairExample(NamedTuple):
    """Both answers of a pair. margin, confidence, weight: as of `Pair`."""

    chosen: _Example
    rejected: _Example
    margin: float = 0.0
    confidence: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True)
class PackedPairs:
    """Pairs in rows, and how many were left out because half a row is too short for one of the answers.

    Sequences 2k and 2k + 1 of a row, counted from 0, are the chosen and the rejected answer of its k-th pair. `margin` and
    `pair_weight` in `per_sequence` are the pair's; the weight is 0 where there is none. `confidence` is there where any is
    below 1.
    """

    batch: Batch
    pairs: int
    skipped: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.batch.tokens_BT.shape[0]


def pack_pairs(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    context_length: int,
    example: Callable[[Encoded, int], _Example | None] = Encoded.example,
) -> PackedPairs:
    """Pairs in few rows. An answer and its prompt take at most half a row.

    example: inputs and targets of an answer of at most this number of tokens, the end cut off; None where no target is left.
    """
    packed: list[PairExample] = []
    for pair in pairs:
        sides = [encode_answer(pair.prompt, answer, tokenizer, pair.tools) for answer in (pair.chosen, pair.rejected)]
        chosen, rejected = (example(side, context_length // 2) for side in sides)
        if chosen is not None and rejected is not None:
            packed.append(PairExample(chosen, rejected, pair.margin, pair.confidence, pair.weight))
    return PackedPairs(pack_examples(packed, context_length, tokenizer.bos_id), len(packed), len(pairs) - len(packed))


def pack_examples(
    pairs: Sequence[PairExample],
    context_length: int,
    padding_id: int,
    row_count: Callable[[int], int] = lambda rows: rows,
) -> Batch:
    """Pairs in few rows of `context_length` tokens, none longer than a row; the batch of `PackedPairs`.

    row_count: from the number of filled rows to the number of rows; the others are empty.
    """
    lengths = [len(pair.chosen[0]) + len(pair.rejected[0]) for pair in pairs]
    row_of = best_fit(lengths, context_length)
    rows: list[list[PairExample]] = [[] for _ in range(row_count(int(row_of.max(initial=-1)) + 1))]
    for item in sorted(range(len(pairs)), key=lambda item: (-lengths[item], item)):
        rows[row_of[item]].append(pairs[item])
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
        pack_rows(examples, context_length, padding_id),
        per_sequence=per_sequence,
        sequences=sequences,
        together=2,
    )
