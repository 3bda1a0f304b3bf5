"""Packing of pairs into rows: a row holds whole pairs, the chosen answer before the rejected one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bessemer.posttraining.encoding import Encoded, encode_answer
from bessemer.posttraining.formats import Pair
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import Batch
from bessemer.training.data.packing import best_fit, pack_rows

_Example = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class PackedPairs:
    """Pairs in rows, and how many were left out because half a row is too short for one of the answers.

    Sequences 2k and 2k + 1 of a row, counted from 0, are the chosen and the rejected answer of its k-th pair. `margin` in
    `per_sequence` is the pair's; `is_pair` is 1 for the sequences that are there.
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
    packed: list[tuple[_Example, _Example, float]] = []
    for pair in pairs:
        sides = [encode_answer(pair.prompt, answer, tokenizer, pair.tools) for answer in (pair.chosen, pair.rejected)]
        chosen, rejected = (example(side, context_length // 2) for side in sides)
        if chosen is not None and rejected is not None:
            packed.append((chosen, rejected, pair.margin))
    lengths = [len(chosen[0]) + len(rejected[0]) for chosen, rejected, _ in packed]
    row_of = best_fit(lengths, context_length)
    rows: list[list[_Example]] = [[] for _ in range(int(row_of.max(initial=-1)) + 1)]
    margins: list[list[float]] = [[] for _ in rows]
    for item in sorted(range(len(packed)), key=lambda item: (-lengths[item], item)):
        chosen, rejected, margin = packed[item]
        rows[row_of[item]] += [chosen, rejected]
        margins[row_of[item]] += [margin, margin]
    sequences = max(map(len, rows), default=2)
    is_pair_BS, margin_BS = torch.zeros(len(rows), sequences), torch.zeros(len(rows), sequences)
    for row, values in enumerate(margins):
        is_pair_BS[row, : len(values)] = 1
        margin_BS[row, : len(values)] = torch.tensor(values)
    batch = replace(
        pack_rows(rows, context_length, tokenizer.bos_id),
        per_sequence={"is_pair": is_pair_BS, "margin": margin_BS},
        sequences=sequences,
        together=2,
    )
    return PackedPairs(batch, len(packed), len(pairs) - len(packed))
