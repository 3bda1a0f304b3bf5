"""Questions with their passages, in rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bessemer.core.errors import SourceError
from bessemer.core.hashing import derive_seed
from bessemer.core.records import read_records
from bessemer.posttraining.embedding.objective import NEGATIVE, POSITIVE, QUERY
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.data.packing import pack_rows

#: Longest share of a row that a text may take; a longer one is cut at its end.
_LONGEST_SHARE = 4


@dataclass(frozen=True)
class QuestionRow:
    """A question, the passage that answers it, and passages that do not."""

    question: str
    text: str
    negatives: tuple[str, ...] = ()


def read_questions(path: Path, negatives: int) -> list[QuestionRow]:
    """The rows of a file, of each the first negatives. Raises ArtefactError for a row without a question or a text."""
    rows = []
    for record in read_records(path):
        others = record.texts("negatives") if record.values.get("negatives") else []
        rows.append(QuestionRow(record.text("question"), record.text("text"), tuple(others[:negatives])))
    return rows


@dataclass(frozen=True)
class PackedQuestions:
    """Questions in rows, with `role`, `group` and `text` in `per_sequence` (`objective.info_nce`)."""

    batch: Batch
    questions: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.batch.tokens_BT.shape[0]


def pack_questions(questions: Sequence[QuestionRow], tokenizer: Tokenizer, context_length: int, seed: int) -> PackedQuestions:
    """Questions with their passages in rows, in an order drawn by the seed, so that the questions of a row are different ones.

    A text takes at most a quarter of a row; negatives that do not fit beside their question and passage are left out. A row
    with a single passage teaches nothing, and is left out. Raises SourceError where none is left.
    """
    longest = context_length // _LONGEST_SHARE
    numbers: dict[str, int] = {}
    rows: list[list[tuple[np.ndarray, int, int, int]]] = []
    filled = context_length + 1
    order = np.random.default_rng(derive_seed(seed, "questions")).permutation(len(questions))
    for group, place in enumerate(order.tolist(), start=1):
        one = questions[place]
        parts = [(one.question, QUERY), (one.text, POSITIVE), *((text, NEGATIVE) for text in one.negatives)]
        same = numbers.setdefault(one.text, len(numbers) + 1)
        texts: list[tuple[np.ndarray, int, int, int]] = []
        taken = 0
        for text, role in parts:
            ids = np.array(tokenizer.encode(text or " ")[:longest], np.int64)
            if taken + len(ids) <= context_length:
                number = same if role == QUERY else numbers.setdefault(text, len(numbers) + 1)
                texts.append((ids, role, group if role != NEGATIVE else 0, number))
                taken += len(ids)
        if filled + taken > context_length:
            rows.append([])
            filled = 0
        rows[-1] += texts
        filled += taken
    rows = [row for row in rows if sum(role != QUERY for _, role, _, _ in row) > 1]
    if not rows:
        raise SourceError("no row holds two passages to tell apart; give more questions, negatives, or a longer context_length")
    sequences = max(map(len, rows))
    values = {name: torch.zeros(len(rows), sequences, dtype=torch.int64) for name in ("role", "group", "text")}
    for number, row in enumerate(rows):
        for name, column in (("role", 1), ("group", 2), ("text", 3)):
            values[name][number, : len(row)] = torch.tensor([part[column] for part in row])
    packed = pack_rows([[_with_target(part[0]) for part in row] for row in rows], context_length, tokenizer.bos_id)
    count = int((values["role"] == QUERY).sum())
    return PackedQuestions(replace(packed, per_sequence=values, sequences=sequences), count)


def _with_target(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A text whose last token is its only target: nothing is predicted, and padding has none."""
    targets = np.full(len(ids), IGNORE_INDEX, np.int64)
    targets[-1] = ids[-1]
    return ids, targets
