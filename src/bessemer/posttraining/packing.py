"""Several conversations in a row of fixed length, none of which sees another.

Shapes: B rows of a batch, R all rows, T tokens of a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_bytes, hash_value
from bessemer.posttraining.conversations import Conversation
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.batches import IGNORED, Batch, rows_of_step


@dataclass(frozen=True)
class Example:
    """Inputs and targets of one conversation, of equal length; a target is -100 where somebody else speaks."""

    tokens: np.ndarray
    targets: np.ndarray


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer, context_length: int) -> Example | None:
    """A conversation as inputs and targets, cut at `context_length`; None when no word of the assistant is left."""
    ids, assistant_mask = tokenizer.encode_chat(conversation.messages, tools=conversation.tools or None)
    tokens = np.array(ids[: context_length + 1], np.int64)
    said = np.array(assistant_mask[: context_length + 1], bool)
    targets = np.where(said, tokens, IGNORED)[1:]
    return Example(tokens[:-1], targets) if said[1:].any() else None


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items go into which row: the longest first, each into the fullest row that still holds it (Johnson 1973).

    Returns the items' numbers, row by row. Every length must be between 1 and `capacity`.
    """
    assert all(1 <= length <= capacity for length in lengths)
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the row), in order
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        place = bisect.bisect_left(room, (lengths[item], -1))
        if place == len(room):
            rows.append([])
            left, row = capacity, len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append(item)
        if left > lengths[item]:
            bisect.insort(room, (left - lengths[item], row))
    return rows


class PackedBatches:
    """Batches of packed conversations; every epoch reads the rows in an order of its own."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        context_length: int,
        seed: int,
    ) -> None:
        """Raises SourceError when none of the conversations has a word of the assistant inside the context."""
        encoded = [encode_conversation(conversation, tokenizer, context_length) for conversation in conversations]
        examples = [example for example in encoded if example is not None]
        if not examples:
            raise SourceError(
                f"none of the {len(conversations):,} conversations reaches the assistant's words within {context_length:,} "
                "tokens; raise context_length"
            )
        self.skipped = len(encoded) - len(examples)
        lengths = [len(example.tokens) for example in examples]
        packed = best_fit(lengths, context_length)
        self.rows = len(packed)
        self.filled = sum(lengths) / (self.rows * context_length)
        self.batch_size, self._seed = batch_size, seed
        shape = (self.rows, context_length)
        self._tokens_RT, self._positions_RT = np.full(shape, tokenizer.bos_id, np.int64), np.zeros(shape, np.int64)
        self._targets_RT, self._documents_RT = np.full(shape, IGNORED, np.int64), np.zeros(shape, np.int64)
        for row, items in enumerate(packed):
            start = 0
            for number, item in enumerate(items, start=1):  # number 0 is the padding's
                place = (row, slice(start, start + lengths[item]))
                self._tokens_RT[place], self._targets_RT[place] = examples[item].tokens, examples[item].targets
                self._positions_RT[place], self._documents_RT[place] = np.arange(lengths[item]), number
                start += lengths[item]
        content = hash_bytes(self._tokens_RT.tobytes(), self._targets_RT.tobytes(), self._documents_RT.tobytes())
        self.fingerprint = hash_value([content, *shape, batch_size, seed])

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0."""
        chosen = rows_of_step(step, self.batch_size, self.rows, self._seed)[rows]
        arrays = (self._tokens_RT, self._targets_RT, self._positions_RT, self._documents_RT)
        return Batch(*(torch.from_numpy(array[chosen]) for array in arrays))
