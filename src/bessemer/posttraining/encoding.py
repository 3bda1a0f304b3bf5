"""Encoding of examples for every method: the token ids of a prompt and an answer, and which of them are learnt.

Learnt is what the assistant says, its calls of tools and the control token that ends its turn; of an answer to a prompt, only
what it says in the answer. Of texts without roles it is the answer and the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bessemer.core.errors import RequestError
from bessemer.posttraining.formats import Message, Turns
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import IGNORE_INDEX


@dataclass(frozen=True)
class Encoded:
    """ids: int64 (N,). is_learnt: bool (N,), of each token."""

    ids: np.ndarray
    is_learnt: np.ndarray

    def example(self, longest: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(inputs, targets) of at most `longest` tokens, the end cut off; -100 is no target. None when no target is left."""
        ids, is_learnt = self.ids[: longest + 1], self.is_learnt[: longest + 1]
        if not is_learnt[1:].any():
            return None
        return ids[:-1], np.where(is_learnt, ids, IGNORE_INDEX)[1:]

    def through_end(self) -> np.ndarray:
        """The ids up to the answer's last learnt token, which is its end token: a template may write more behind it."""
        return self.ids[: int(np.flatnonzero(self.is_learnt)[-1]) + 1]

    def scored(self, longest: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(inputs, targets) for a score of the answer: all tokens up to its end token, which is its own target, the only one.

        None where that is not within `longest` tokens: a score in the midst of an answer would be that of another one.
        """
        ids = self.through_end()
        if len(ids) > longest:
            return None
        targets = np.full(len(ids), IGNORE_INDEX, np.int64)
        targets[-1] = ids[-1]
        return ids, targets


def encode_answer(prompt: Turns, answer: Turns, tokenizer: Tokenizer, tools: Sequence[Message] = ()) -> Encoded:
    """A prompt and an answer, both messages or both texts.

    Raises RequestError where the template cannot be trained on, where it ends no turn, and where nothing is learnt.
    """
    if isinstance(prompt, str) or isinstance(answer, str):
        if not (isinstance(prompt, str) and isinstance(answer, str)):
            raise TypeError("prompt and answer must both be texts or both messages")
        before, after = tokenizer.encode(prompt), [*_continuation(prompt, answer, tokenizer), tokenizer.eos_ids[0]]
        return Encoded(np.array(before + after, np.int64), np.arange(len(before) + len(after)) >= len(before))
    ids, is_learnt = _marked([*prompt, *answer], tokenizer, tools)
    turns = _beginnings(is_learnt)
    # not the number of its messages: a template marks nothing in an empty one
    spoken = len(_beginnings(_marked(prompt, tokenizer, tools)[1])) if any(map(_speaks, prompt)) else 0
    if len(turns) <= spoken:
        raise RequestError(
            "nothing in this conversation would be learnt: the chat template marks no word of the assistant's in the answer"
        )
    is_learnt[: turns[spoken]] = False
    _check_ends(ids, is_learnt, tokenizer)
    return Encoded(ids, is_learnt)


def _continuation(prompt: str, answer: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text behind another one. Alone it may be encoded otherwise: SentencePiece puts a space before a text."""
    before, joint = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    is_continued = len(joint) > len(before) and joint[: len(before)] == before
    return joint[len(before) :] if is_continued else tokenizer.encode(answer, add_bos=False)


def _marked(messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a conversation, and which of them the template marks as the assistant's."""
    ids, said = tokenizer.encode_chat(messages, tools=tools or None)
    return np.array(ids, np.int64), np.array(said, bool)


def _beginnings(is_marked: np.ndarray) -> np.ndarray:
    """Where runs of marked tokens begin."""
    return np.flatnonzero(np.diff(is_marked, prepend=False) & is_marked)


def _check_ends(ids: np.ndarray, is_learnt: np.ndarray, tokenizer: Tokenizer) -> None:
    """Every turn that is learnt ends in a control token, behind which a template may write white space."""
    for begin, end in zip(_beginnings(is_learnt), np.flatnonzero(np.diff(is_learnt, append=False) & is_learnt), strict=True):
        turn = ids[begin : end + 1].tolist()
        while turn and not tokenizer.is_end(turn[-1]) and not tokenizer.decode(turn[-1:]).strip():
            turn.pop()
        if not turn or not tokenizer.is_end(turn[-1]):
            raise RequestError(
                "the chat template ends what the assistant says by no control token, so that a model would not learn to stop"
            )


def _speaks(message: Any) -> bool:
    return bool(message["role"] == "assistant")


def encode_prompt(prompt: Turns, tokenizer: Tokenizer, tools: Sequence[Message] = ()) -> list[int]:
    """The ids of a prompt, up to where the answer begins."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tools=tools or None)
