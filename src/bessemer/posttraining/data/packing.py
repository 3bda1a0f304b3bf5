"""Packing of examples into rows of fixed length, in which they do not attend to each other.

A row holds whole conversations, whole pairs (the chosen answer before the rejected one), or single good or bad answers. The
prompt of a pair stands in the row once if the model supports that (Wang and Hegde 2024, "Accelerating direct preference
optimization with prefix sharing").

KTO measures answers against the policy's Kullback–Leibler divergence from its reference, which is estimated on *mismatched*
examples: the prompt of each with the answer to another prompt (Ethayarajh et al. 2024, section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bessemer.core.errors import RequestError, SourceError
from bessemer.core.hashing import hash_bytes, hash_value
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.storage.model_config import read_decoder_config
from bessemer.posttraining.data.encoding import Encoded, Row, RowCounts, RowFitter, encode_turns
from bessemer.posttraining.data.examples import Conversation, prompt_key
from bessemer.posttraining.data.formats import Answered, Labelled, Pair, Turns
from bessemer.posttraining.data.made import Truncate
from bessemer.posttraining.data.picture_encoding import READS_NONE, PictureEncoder, encode_seen
from bessemer.posttraining.data.picture_rows import has_pictures
from bessemer.posttraining.data.turns import RowError
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.config import LoopConfig
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.data.batches import StatelessBatches, rows_of_step
from bessemer.training.data.packing import best_fit, pack_rows
from bessemer.training.loop import OnStepEnd, validation_metrics


@dataclass(frozen=True)
class EncodedExample:
    """Inputs and targets of one conversation, of equal length; a target is -100 outside the assistant's messages."""

    tokens: np.ndarray
    targets: np.ndarray


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer) -> list[Encoded]:
    """The examples of a conversation. Raises as `encode_turns`."""
    answered = conversation.answered
    return encode_turns(answered.prompt, answered.answer, tokenizer, answered.tools, pictures=True)


def fit_each(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    context_length: int,
    truncate: Truncate = "drop",
    pictures: PictureEncoder | None = None,
) -> tuple[list[list[EncodedExample]], RowFitter]:
    """The examples of each conversation that have at most `context_length` tokens, and the `RowFitter` that counted the others.
    A long document gives several examples. pictures: of a model that reads them, whose examples `PictureEncoder.placed` then
    takes."""
    fitter = RowFitter(context_length, truncate)

    def encoded(one: Conversation) -> list[Encoded]:
        examples = encode_conversation(one, tokenizer)
        if has_pictures(one.messages):
            if pictures is None:
                raise RowError(READS_NONE)
            examples = pictures.expanded(one.messages, one.folder, examples)
        return [window for text in examples for window in text.windows(context_length)] if one.is_document else examples

    fitted = [fitter.fit_turns(partial(encoded, one), one.place) for one in conversations]
    return [[EncodedExample(*row) for row in rows] for rows in fitted], fitter


def fit_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    context_length: int,
    truncate: Truncate = "drop",
    pictures: PictureEncoder | None = None,
) -> tuple[list[EncodedExample], RowCounts]:
    """Conversations as examples of at most `context_length` tokens, and counts of the others. Raises SourceError as
    `RowFitter.counts`."""
    examples, fitter = fit_each(conversations, tokenizer, context_length, truncate, pictures)
    return [example for of_one in examples for example in of_one], fitter.counts("conversations")


@dataclass(frozen=True)
class PackedConversations:
    """Conversations in rows, and counts of those that were left out or cut."""

    batch: Batch
    counts: RowCounts

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.batch.tokens_BT.shape[0]

    @property
    def filled(self) -> float:
        """Share of the rows' places that hold tokens of conversations."""
        assert self.batch.document_ids_BT is not None
        return float((self.batch.document_ids_BT > 0).double().mean())


def pack_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    context_length: int,
    truncate: Truncate = "drop",
    pictures: PictureEncoder | None = None,
) -> PackedConversations:
    """Conversations in as few rows as best-fit decreasing finds. The other arguments as in, and raises as, `fit_each`."""
    examples, counts = fit_conversations(conversations, tokenizer, context_length, truncate, pictures)
    return PackedConversations(pack_examples(examples, tokenizer, context_length), counts)


def pack_examples(examples: Sequence[EncodedExample], tokenizer: Tokenizer, context_length: int) -> Batch:
    """Examples of at most `context_length` tokens, in as few rows as best-fit decreasing finds."""
    lengths = [len(example.tokens) for example in examples]
    row_of = best_fit(lengths, context_length)
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(int(row_of.max(initial=-1)) + 1)]
    for item in sorted(range(len(examples)), key=lambda item: (-lengths[item], item)):
        rows[row_of[item]].append((examples[item].tokens, examples[item].targets))
    return pack_rows(rows, context_length, tokenizer.bos_id)


class PackedBatches(StatelessBatches):
    """Batches of packed rows; every epoch reads them in another order."""

    def __init__(self, packed: Batch, *, batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self.rows = packed.tokens_BT.shape[0]
        self._seed = seed
        self._packed = packed
        self.pictures = packed.pictures
        self.fingerprint = hash_value([_content(packed), *packed.tokens_BT.shape, batch_size, seed])

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        chosen = rows_of_step(step, self.batch_size, self.rows, self._seed)[rows]
        return self._packed.rows(chosen)


class HeldOutBatches(StatelessBatches):
    """Batches that read every packed row once, in order; the last batch is padded with rows without targets, whose sequences
    have the value 0."""

    def __init__(self, packed: Batch, batch_size: int) -> None:
        self.batch_size = batch_size
        self.steps = math.ceil(packed.tokens_BT.shape[0] / batch_size)
        self._packed = packed
        self.fingerprint = hash_value([_content(packed), *packed.tokens_BT.shape, batch_size])

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        places, count = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows], self._packed.tokens_BT.shape[0]
        batch = self._packed.rows(np.minimum(places, count - 1))
        beyond_B1 = torch.from_numpy(places >= count)[:, None]
        return replace(
            batch,
            targets_BT=batch.targets_BT.masked_fill(beyond_B1, IGNORE_INDEX),
            per_sequence={name: values_BS.masked_fill(beyond_B1, 0) for name, values_BS in batch.per_sequence.items()},
        )


def validation_on(packed: Batch, config: LoopConfig) -> OnStepEnd:
    """A validation on packed rows at the steps that the settings name; it gives no metrics if there are no rows."""
    if not packed.tokens_BT.shape[0]:
        return lambda finished, trainer: {}
    source, validated = HeldOutBatches(packed, config.batch_size), config.validated_steps
    return lambda finished, trainer: validation_metrics(trainer, source, source.steps) if finished in validated else {}


def _content(packed: Batch) -> str:
    arrays = (
        packed.tokens_BT,
        packed.targets_BT,
        packed.document_ids_BT,
        packed.visible_to_BT,
        packed.vector_of_token_BT,
        *packed.per_sequence.values(),
    )
    pictures = [] if packed.pictures is None else [packed.pictures.fingerprint.encode()]
    return hash_bytes(*(array.numpy().tobytes() for array in arrays if array is not None), *pictures)


class PairExample(NamedTuple):
    """Both answers of a pair. margin, confidence, weight: as in `Pair`."""

    chosen: Row
    rejected: Row
    margin: float = 0.0
    confidence: float = 1.0
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Number of tokens of both answers with their prompts."""
        return len(self.chosen[0]) + len(self.rejected[0])

    def without_shared(self) -> tuple[PairExample, int]:
        """The pair with the common beginning removed from the rejected side, and the number of tokens removed. Only tokens
        before any target are removed, and at least one token of the rejected side stays."""
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
    """Pairs in rows, and counts of the others. equal: pairs left out because both answers are the same.

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
    pictures: PictureEncoder | None = None,
) -> PackedPairs:
    """Pairs in few rows. An answer and its prompt take at most half a row; longer ones are treated as by `RowFitter`.
    shares_prompts: as in `pack_pair_examples`. pictures: of a model that reads them, whose rows `placed` then takes. Raises
    SourceError where longer ones are refused."""
    fitter = RowFitter(context_length // 2, truncate, example)
    packed: list[PairExample] = []
    equal = 0

    def encoded(pair: Pair, answer: Turns) -> Encoded:
        return encode_seen(Answered(pair.prompt, answer, pair.tools), tokenizer, pair.folder, pictures)

    for pair in pairs:
        rows = fitter.fit(*(partial(encoded, pair, answer) for answer in (pair.chosen, pair.rejected)))
        if rows is None:
            continue
        chosen, rejected = rows
        if _are_equal(chosen, rejected):
            equal += 1
        else:
            packed.append(PairExample(chosen, rejected, pair.margin, pair.confidence, pair.weight))
    batch = pack_pair_examples(packed, context_length, tokenizer.bos_id, shares_prompts=shares_prompts)
    return PackedPairs(batch, len(packed), fitter.counts("pairs"), equal)


def _are_equal(first: Row, second: Row) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def can_share_prompts(config: LoopConfig, model: Path) -> bool:
    """Whether documents may share prefixes (`ModelRoles.shares_prefixes`), for a model's folder and a run's settings."""
    return config.parallel.context == 1 and read_decoder_config(model).shares_prefixes


def pack_pair_examples(
    pairs: Sequence[PairExample],
    context_length: int,
    padding_id: int,
    row_count: Callable[[int], int] = lambda rows: rows,
    *,
    shares_prompts: bool = False,
) -> Batch:
    """Pairs in few rows of `context_length` tokens, none longer than a row; the batch of `PackedPairs`.

    row_count: of the number of filled rows, the number of rows; empty ones are added. shares_prompts: what both answers begin
    with stands in the row once, for models that support it (`ModelConfig.shares_prefixes`); values and gradients are the same
    as for separate answers.
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
        """Values of pairs, repeated for both answers of each."""
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


#: Prefix of the values per token that hold the rows of mismatched examples.
_TWIN = "mismatched_"


@dataclass(frozen=True)
class PackedAnswers:
    """Answers in rows, and counts of the others. `is_answer` in `per_sequence` is 1 for sequences that hold an answer,
    `is_desirable` for good ones. `mismatched` gives the rows of their mismatched twins, in the same order.
    """

    batch: Batch
    answers: int
    counts: RowCounts

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.batch.tokens_BT.shape[0]


def pack_answers(
    examples: Sequence[Labelled],
    tokenizer: Tokenizer,
    context_length: int,
    truncate: Truncate = "drop",
    pictures: PictureEncoder | None = None,
) -> PackedAnswers:
    """Answers in few rows, and rows of their mismatched twins, which are cut at a row's length since nothing is learnt from
    them. The twin of an example has the answer of the nearest example before it with another prompt. pictures: as in
    `pack_pairs`. Raises SourceError where all prompts are the same, where some are texts and some messages, and where longer
    ones are refused.
    """
    if len({isinstance(one.answered.prompt, str) for one in examples}) > 1:
        raise SourceError("loss kto compares answers with each other, and some rows are texts and some messages; give one kind")
    fitter = RowFitter(context_length, truncate)
    packed: list[tuple[Row, Row, bool]] = []
    for example, place in zip(examples, others_before([prompt_key(one.answered.prompt) for one in examples]), strict=True):
        answered, other = example.answered, examples[place].answered
        fitted = fitter.fit(partial(encode_seen, answered, tokenizer, example.folder, pictures))
        if fitted is None:
            continue
        try:
            unlike = replace(answered, answer=other.answer)
            twin = encode_seen(unlike, tokenizer, example.folder, pictures).beginning(context_length)
        except RequestError:
            # the example that would give the twin's answer is left out
            continue
        if twin is not None:
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
    twin_rows = pack_rows(twins, context_length, tokenizer.bos_id)
    names = ("tokens_BT", "targets_BT", "positions_BT", "document_ids_BT")
    batch = replace(
        _labelled_batch(owns, labels, context_length, tokenizer.bos_id),
        per_token={f"{_TWIN}{name}": getattr(twin_rows, name) for name in names},
    )
    return PackedAnswers(batch, len(packed), fitter.counts("answers"))


def pack_forgetting(
    forget: Sequence[Labelled],
    keep: Sequence[Labelled],
    tokenizer: Tokenizer,
    context_length: int,
    truncate: Truncate = "drop",
    pictures: PictureEncoder | None = None,
) -> PackedAnswers:
    """Answers to forget and others to keep, in rows that hold their share of both, so that every batch does. `is_answer` and
    `is_desirable` as in `PackedAnswers`, the latter of those to keep. pictures: as in `pack_pairs`.

    The end of an answer to forget is no target: that a text ends is not forgotten. Raises SourceError where longer ones are
    refused.
    """
    fitter = RowFitter(context_length, truncate)
    rows: list[list[Row]] = []
    labels: list[list[bool]] = []
    packed = 0
    # the k-th of n stands at (k + ½) / n of the whole
    places = [((place + 0.5) / len(some), example) for some in (forget, keep) for place, example in enumerate(some)]
    for _, example in sorted(places, key=lambda item: item[0]):
        fitted = fitter.fit(partial(encode_seen, example.answered, tokenizer, example.folder, pictures))
        if fitted is None:
            continue
        tokens, targets = fitted[0]
        if not example.is_desirable:
            (learnt,) = np.nonzero(targets != IGNORE_INDEX)
            if len(learnt) < 2:
                continue
            targets = targets.copy()
            targets[learnt[-1]] = IGNORE_INDEX
        if not rows or sum(len(there) for there, _ in rows[-1]) + len(tokens) > context_length:
            rows.append([])
            labels.append([])
        rows[-1].append((tokens, targets))
        labels[-1].append(example.is_desirable)
        packed += 1
    return PackedAnswers(_labelled_batch(rows, labels, context_length, tokenizer.bos_id), packed, fitter.counts("answers"))


def _labelled_batch(
    rows: Sequence[Sequence[Row]], labels: Sequence[Sequence[bool]], context_length: int, padding_id: int
) -> Batch:
    """Rows of answers with `is_answer` and `is_desirable`."""
    sequences = max(map(len, labels), default=1)
    is_answer_BS, is_desirable_BS = torch.zeros(len(rows), sequences), torch.zeros(len(rows), sequences)
    for row, values in enumerate(labels):
        is_answer_BS[row, : len(values)] = 1
        is_desirable_BS[row, : len(values)] = torch.tensor(values, dtype=torch.float32)
    return replace(
        pack_rows(rows, context_length, padding_id),
        per_sequence={"is_answer": is_answer_BS, "is_desirable": is_desirable_BS},
        sequences=sequences,
    )


def has_mismatched(batch: Batch) -> bool:
    """Whether twins lie beside the rows of a batch."""
    return any(name.startswith(_TWIN) for name in batch.per_token)


def placed(batch: Batch, pictures: PictureEncoder | None) -> Batch:
    """Packed rows with image tokens in the places of pictures, as `PictureEncoder.placed`, and their twins' too."""
    if pictures is None:
        return batch
    whole = pictures.placed(batch)
    if has_mismatched(batch):
        twins = pictures.placed(mismatched(batch))
        if twins.vector_of_token_BT is not None:
            own = {f"{_TWIN}tokens_BT": twins.tokens_BT, f"{_TWIN}vector_of_token_BT": twins.vector_of_token_BT}
            if twins.rope_BT3 is not None:
                own[f"{_TWIN}rope_BT3"] = twins.rope_BT3
            whole = whole.with_values(per_token=own)
    return whole


def mismatched(batch: Batch) -> Batch:
    """The twins of a batch of packed answers, row by row."""
    of = batch.per_token
    return Batch(
        of[f"{_TWIN}tokens_BT"],
        of[f"{_TWIN}targets_BT"],
        of[f"{_TWIN}positions_BT"],
        of[f"{_TWIN}document_ids_BT"],
        vector_of_token_BT=of.get(f"{_TWIN}vector_of_token_BT"),
        rope_BT3=of.get(f"{_TWIN}rope_BT3"),
        pictures=batch.pictures,
        per_sequence={"is_answer": batch.per_sequence["is_answer"]},
        sequences=batch.sequences,
    )


def others_before(keys: Sequence[str]) -> list[int]:
    """For each place the nearest earlier one with another key; before the first place comes the last.

    Raises SourceError where all keys are the same.
    """
    if not keys:
        return []
    if len(set(keys)) < 2:
        raise SourceError("loss kto compares answers with those to other prompts, and all of these have the same prompt")
    starts = [0] * len(keys)
    # go through twice, since the first places look back past the beginning
    for step in range(2 * len(keys)):
        place, before = step % len(keys), (step - 1) % len(keys)
        starts[place] = before if keys[before] != keys[place] else starts[before]
    return starts
