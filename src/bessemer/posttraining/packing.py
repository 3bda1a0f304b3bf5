"""Packing of conversations into rows of fixed length, in which they do not attend to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from bessemer.core.errors import RequestError
from bessemer.core.hashing import hash_bytes, hash_value
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.posttraining.config import Truncate
from bessemer.posttraining.conversations import Conversation
from bessemer.posttraining.encoding import Encoded, NothingLearntError, RowCounts, RowFitter, encode_answer
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.config import LoopConfig
from bessemer.training.data.batches import IGNORE_INDEX, Batch, StatelessBatches, rows_of_step
from bessemer.training.data.packing import best_fit, pack_rows
from bessemer.training.optim.lr_schedule import validated_steps
from bessemer.training.run import OnStepEnd, validation_metrics


@dataclass(frozen=True)
class Example:
    """Inputs and targets of one conversation, of equal length; a target is -100 outside the assistant's messages."""

    tokens: np.ndarray
    targets: np.ndarray


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer) -> Encoded:
    """The tokens of a conversation. Raises RequestError as `encode_answer`, with the row where it is known."""
    answered = conversation.answered
    try:
        return encode_answer(answered.prompt, answered.answer, tokenizer, answered.tools)
    except NothingLearntError:
        raise
    except RequestError as error:
        if not conversation.place:
            raise
        raise RequestError(f"{conversation.place}: {error}") from None


def fit_conversations(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, context_length: int, truncate: Truncate = "drop"
) -> tuple[list[Example], RowCounts]:
    """Conversations as examples of at most `context_length` tokens, and what became of the others. Raises SourceError where
    longer ones are refused."""
    fitter = RowFitter(context_length, truncate)
    fitted = [fitter.fit(partial(encode_conversation, one, tokenizer)) for one in conversations]
    return [Example(*rows[0]) for rows in fitted if rows is not None], fitter.counts("conversations")


@dataclass(frozen=True)
class PackedConversations:
    """Conversations in rows, and what became of those that are not, or not whole."""

    batch: Batch
    counts: RowCounts

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.batch.tokens_BT.shape[0]

    @property
    def filled(self) -> float:
        """Fraction of the rows' tokens that conversations fill."""
        assert self.batch.document_ids_BT is not None
        return float((self.batch.document_ids_BT > 0).double().mean())


def pack_conversations(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, context_length: int, truncate: Truncate = "drop"
) -> PackedConversations:
    """Conversations in as few rows as best-fit decreasing finds. truncate, and what is raised: as of `fit_conversations`."""
    examples, counts = fit_conversations(conversations, tokenizer, context_length, truncate)
    return PackedConversations(pack_examples(examples, tokenizer, context_length), counts)


def pack_examples(examples: Sequence[Example], tokenizer: Tokenizer, context_length: int) -> Batch:
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
        self.fingerprint = hash_value([_content(packed), *packed.tokens_BT.shape, batch_size, seed])

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0."""
        chosen = rows_of_step(step, self.batch_size, self.rows, self._seed)[rows]
        return self._packed.rows(chosen)


class HeldOutBatches(StatelessBatches):
    """Batches that read every packed row once, in order; the last one is filled with rows without targets, whose sequences have
    zeros for values."""

    def __init__(self, packed: Batch, batch_size: int) -> None:
        self.batch_size = batch_size
        self.steps = math.ceil(packed.tokens_BT.shape[0] / batch_size)
        self._packed = packed
        self.fingerprint = hash_value([_content(packed), *packed.tokens_BT.shape, batch_size])

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0."""
        places, count = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows], self._packed.tokens_BT.shape[0]
        batch = self._packed.rows(np.minimum(places, count - 1))
        beyond_B1 = torch.from_numpy(places >= count)[:, None]
        return replace(
            batch,
            targets_BT=batch.targets_BT.masked_fill(beyond_B1, IGNORE_INDEX),
            per_sequence={name: values_BS.masked_fill(beyond_B1, 0) for name, values_BS in batch.per_sequence.items()},
        )


def validation_on(packed: Batch, config: LoopConfig) -> OnStepEnd:
    """What validates on packed rows at the steps that the settings name; nothing where there are no rows."""
    if not packed.tokens_BT.shape[0]:
        return lambda finished, trainer: {}
    source, validated = HeldOutBatches(packed, config.batch_size), validated_steps(config)
    return lambda finished, trainer: validation_metrics(trainer, source, source.steps) if finished in validated else {}


def _content(packed: Batch) -> str:
    arrays = (
        packed.tokens_BT,
        packed.targets_BT,
        packed.document_ids_BT,
        packed.visible_to_BT,
        *packed.per_sequence.values(),
    )
    return hash_bytes(*(array.numpy().tobytes() for array in arrays if array is not None))
