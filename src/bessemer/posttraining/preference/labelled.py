"""Packing of answers that are good or bad by themselves, each beside its mismatched twin.

KTO measures answers against how far the policy has moved from its reference on the whole, a Kullback–Leibler divergence. It is
estimated on *mismatched* examples: the prompt of each with the answer to another prompt (Ethayarajh et al. 2024, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from bessemer.core.errors import SourceError
from bessemer.posttraining.config import Truncate
from bessemer.posttraining.dataset import prompt_key
from bessemer.posttraining.encoding import Row, RowCounts, RowFitter, encode_answer
from bessemer.posttraining.formats import Labelled
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import Batch
from bessemer.training.data.packing import best_fit, pack_rows

#: Rows of the mismatched examples, which lie beside a batch's own as values of tokens.
_TWIN = "mismatched_"


@dataclass(frozen=True)
class PackedAnswers:
    """Answers in rows, and what became of the others.

    `is_answer` in `per_sequence` is 1 for the sequences that are there, `is_desirable` for the good ones. `mismatched` gives
    the rows of their twins, in the same order.
    """

    batch: Batch
    answers: int
    counts: RowCounts

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.batch.tokens_BT.shape[0]


def pack_answers(
    examples: Sequence[Labelled], tokenizer: Tokenizer, context_length: int, truncate: Truncate = "drop"
) -> PackedAnswers:
    """Answers in few rows; rows of twins beside them, of which the end is cut off at a row's length: no answer is learnt there.

    The twin of an example has the answer of the one before it that has another prompt. Raises SourceError where all have the
    same, where some are texts and some messages, and where longer ones are refused.
    """
    if len({isinstance(one.answered.prompt, str) for one in examples}) > 1:
        raise SourceError("loss kto compares answers with each other, and some rows are texts and some messages; give one kind")
    fitter = RowFitter(context_length, truncate)
    packed: list[tuple[Row, Row, bool]] = []
    for example, place in zip(examples, others_before([prompt_key(one.answered.prompt) for one in examples]), strict=True):
        answered, other = example.answered, examples[place].answered
        fitted = fitter.fit(partial(encode_answer, answered.prompt, answered.answer, tokenizer, answered.tools))
        twin = encode_answer(answered.prompt, other.answer, tokenizer, answered.tools).beginning(context_length)
        if fitted is not None and twin is not None:
            packed.append((fitted[0], twin, example.is_desirable))
    lengths = [max(len(own[0]), len(twin[0])) for own, twin, _ in packed]
    row_of = best_fit(lengths, context_length)
    count = int(row_of.max(initial=-1)) + 1
    owns: list[list[Row]] = [[] for _ in range(count)]
    twins: list[list[Row]] = [[] for _ in range(count)]
    labels: list[list[bool]] = [[] for _ in range(count)]
    for item in sorted(range(len(packed)), key=lambda item: (-lengths[item], item)):
        own, twin, is_desirable = packed[item]
        owns[row_of[item]].append(own)
        twins[row_of[item]].append(twin)
        labels[row_of[item]].append(is_desirable)
    sequences = max(map(len, labels), default=1)
    is_answer_BS, is_desirable_BS = torch.zeros(count, sequences), torch.zeros(count, sequences)
    for row, values in enumerate(labels):
        is_answer_BS[row, : len(values)] = 1
        is_desirable_BS[row, : len(values)] = torch.tensor(values, dtype=torch.float32)
    beside = pack_rows(twins, context_length, tokenizer.bos_id)
    names = ("tokens_BT", "targets_BT", "positions_BT", "document_ids_BT")
    batch = replace(
        pack_rows(owns, context_length, tokenizer.bos_id),
        per_token={f"{_TWIN}{name}": getattr(beside, name) for name in names},
        per_sequence={"is_answer": is_answer_BS, "is_desirable": is_desirable_BS},
        sequences=sequences,
    )
    return PackedAnswers(batch, len(packed), fitter.counts("answers"))


def has_mismatched(batch: Batch) -> bool:
    """Whether twins lie beside the rows of a batch."""
    return any(name.startswith(_TWIN) for name in batch.per_token)


def mismatched(batch: Batch) -> Batch:
    """The twins of a batch of packed answers, row by row."""
    of = batch.per_token
    return Batch(
        of[f"{_TWIN}tokens_BT"],
        of[f"{_TWIN}targets_BT"],
        of[f"{_TWIN}positions_BT"],
        of[f"{_TWIN}document_ids_BT"],
        per_sequence={"is_answer": batch.per_sequence["is_answer"]},
        sequences=batch.sequences,
    )


def others_before(keys: Sequence[str]) -> list[int]:
    """For each place the nearest one before it with another key, the last place coming before the first.

    Raises SourceError where all keys are the same.
    """
    if not keys:
        return []
    if len(set(keys)) < 2:
        raise SourceError("loss kto compares answers with those to other prompts, and all of these have the same prompt")
    found = [0] * len(keys)
    # twice around: the first places look back beyond the beginning
    for step in range(2 * len(keys)):
        place, before = step % len(keys), (step - 1) % len(keys)
        found[place] = before if keys[before] != keys[place] else found[before]
    return found
