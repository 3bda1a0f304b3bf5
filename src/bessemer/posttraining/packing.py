"""Packing of conversations into rows of fixed length, in which they do not attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_bytes, hash_value
from bessemer.posttraining.conversations import Conversation
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import IGNORE_INDEX, Batch, rows_of_step
from bessemer.training.data.packing import best_fit, pack_rows


@dataclass(frozen=True)
class Example:
    """Inputs and targets of one conversation, of equal length; a target is -100 outside the assistant's messages."""

    tokens: np.ndarray
    targets: np.ndarray


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer, context_length: int) -> Example | None:
    """A conversation as inputs and targets, truncated at `context_length`; None when no token of the assistant is left."""
    ids, assistant_mask = tokenizer.encode_chat(conversation.messages, tools=conversation.tools or None)
    tokens = np.array(ids[: context_length + 1], np.int64)
    is_assistant = np.array(assistant_mask[: context_length + 1], bool)
    targets = np.where(is_assistant, tokens, IGNORE_INDEX)[1:]
    return Example(tokens[:-1], targets) if is_assistant[1:].any() else None


class PackedBatches:
    """Batches of packed conversations; every epoch reads the rows in another order."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        context_length: int,
        seed: int,
    ) -> None:
        """Raises SourceError when no conversation has a token of the assistant inside the context."""
        encoded = [encode_conversation(conversation, tokenizer, context_length) for conversation in conversations]
        examples = [example for example in encoded if example is not None]
        if not examples:
            raise SourceError(
                f"none of the {len(conversations):,} conversations reaches the assistant's words within {context_length:,} "
                "tokens; raise context_length"
            )
        self.skipped = len(encoded) - len(examples)
        lengths = [len(example.tokens) for example in examples]
        row_of = best_fit(lengths, context_length)
        rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(int(row_of.max()) + 1)]
        for item in sorted(range(len(examples)), key=lambda item: (-lengths[item], item)):
            rows[row_of[item]].append((examples[item].tokens, examples[item].targets))
        self.rows = len(rows)
        self.filled = sum(lengths) / (self.rows * context_length)
        self.batch_size = batch_size
        self._seed = seed
        self._packed = pack_rows(rows, context_length, tokenizer.bos_id)
        shape = (self.rows, context_length)
        arrays = (self._packed.tokens_BT, self._packed.targets_BT, self._packed.document_ids_BT)
        content = hash_bytes(*(array.numpy().tobytes() for array in arrays if array is not None))
        self.fingerprint = hash_value([content, *shape, batch_size, seed])

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0."""
        chosen = rows_of_step(step, self.batch_size, self.rows, self._seed)[rows]
        return self._packed.rows(chosen)
