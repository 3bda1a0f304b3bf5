"""Encoding of examples for every method: the token ids of a prompt and an answer, which of them are learnt, and what becomes of
examples that are longer than a row.

Learnt is what the assistant says, its calls of tools and the control token that ends its turn; of an answer to a prompt, only
what it says in the answer. Of texts without roles it is the answer and the end token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bessemer.core.errors import RequestError, SourceError
from bessemer.posttraining.data.formats import Message, Turns
from bessemer.posttraining.data.made import Truncate
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import IGNORE_INDEX

#: Inputs and targets, of equal length; -100 marks a token without a target.
Row = tuple[np.ndarray, np.ndarray]


class NothingLearntError(RequestError):
    """An example in which the chat template, or the messages' weights, leave the assistant no word to learn."""


@dataclass(frozen=True)
class Encoded:
    """ids: int64 (N,). is_learnt: bool (N,), of each token."""

    ids: np.ndarray
    is_learnt: np.ndarray

    @property
    def inputs(self) -> int:
        """Number of input tokens in a row: all before the last learnt token, which is only a target."""
        return int(np.flatnonzero(self.is_learnt)[-1]) if self.is_learnt.any() else 0

    def example(self, longest: int, truncate: Truncate = "drop") -> Row | None:
        """(inputs, targets) of at most `longest` tokens; -100 is no target. None when no target is left.

        A longer example is None, but with `left` its last tokens: what the assistant says is learnt where it is whole, and with
        its end, and is context where its beginning is cut off. The end is never cut off: a model would not learn to stop.
        Behind the last target tokens may go.
        """
        ids, is_learnt = self.ids[: longest + 1], self.is_learnt[: longest + 1]
        if self.inputs > longest:
            if truncate != "left":
                return None
            first = self.inputs - longest
            ids, is_learnt = self.through_end()[first:], self.is_learnt[first : self.inputs + 1].copy()
            # the first token has no target, so a turn that it belongs to is not whole
            (unlearnt,) = np.nonzero(~is_learnt)
            is_learnt[: unlearnt[0] if len(unlearnt) else None] = False
        if not is_learnt[1:].any():
            return None
        return ids[:-1], np.where(is_learnt, ids, IGNORE_INDEX)[1:]

    def windows(self, longest: int) -> list[Row]:
        """(inputs, targets) of a text that is learnt whole, in windows of at most `longest` tokens, one behind the other."""
        targets = np.where(self.is_learnt, self.ids, IGNORE_INDEX)[1:]
        return [
            (self.ids[begin : min(begin + longest, len(targets))], targets[begin : begin + longest])
            for begin in range(0, len(targets), longest)
        ]

    def through_end(self) -> np.ndarray:
        """The ids up to the answer's last learnt token, which is its end token: a template may write more behind it."""
        return self.ids[: self.inputs + 1]

    def beginning(self, longest: int) -> Row | None:
        """(inputs, targets) of the first `longest` tokens, for an estimate over answers that nothing is learnt from. None when
        no target is left."""
        ids, is_learnt = self.ids[: longest + 1], self.is_learnt[: longest + 1]
        return (ids[:-1], np.where(is_learnt, ids, IGNORE_INDEX)[1:]) if is_learnt[1:].any() else None

    def scored(self, longest: int) -> Row | None:
        """(inputs, targets) for a score of the answer: all tokens up to its end token, which is its own target, the only one.

        None where that is not within `longest` tokens: a score in the midst of an answer would be that of another one.
        """
        ids = self.through_end()
        if len(ids) > longest:
            return None
        targets = np.full(len(ids), IGNORE_INDEX, np.int64)
        targets[-1] = ids[-1]
        return ids, targets


@dataclass(frozen=True)
class RowCounts:
    """Counts of examples. too_long, nothing_learnt: left out. cut: kept without their beginning.
    longest: tokens of a row."""

    longest: int
    too_long: int = 0
    nothing_learnt: int = 0
    cut: int = 0

    @property
    def left_out(self) -> int:
        """Number of examples left out, for either reason."""
        return self.too_long + self.nothing_learnt

    @property
    def figures(self) -> dict[str, int]:
        """For a stage's metrics."""
        return {"too_long": self.too_long, "nothing_learnt": self.nothing_learnt, "cut": self.cut}

    def sentences(self, of: str) -> list[str]:
        """A sentence for each count above zero. of: all examples, as in `1,000 conversations`."""
        within = f"{self.longest:,} tokens"
        said = {
            f"are left out: longer than {within} (truncate: drop)": self.too_long,
            "are left out: the assistant says nothing in them that is learnt": self.nothing_learnt,
            f"are longer than {within}, and their beginning is cut off (truncate: left)": self.cut,
        }
        return [f"  {number:,} of {of} {what}" for what, number in said.items() if number]


class RowFitter:
    """Fits examples into rows of at most `longest` tokens by a rule, and counts the results.

    example: inputs and targets of what is encoded, or None where that is not within a number of tokens; `Encoded.example` by
    the rule where nothing is said.
    """

    def __init__(
        self, longest: int, truncate: Truncate = "drop", example: Callable[[Encoded, int], Row | None] | None = None
    ) -> None:
        self._longest = longest
        self._truncate: Truncate = truncate
        self._example = example or (lambda encoded, longest: encoded.example(longest, truncate))
        self._too_long, self._nothing_learnt, self._cut = 0, 0, 0
        self._most = 0

    def fit(self, *encode: Callable[[], Encoded]) -> list[Row] | None:
        """Rows of encoded examples; None unless all of them fit."""
        try:
            encoded = [one() for one in encode]
        except NothingLearntError:
            self._nothing_learnt += 1
            return None
        rows = [row for one in encoded if (row := self._example(one, self._longest)) is not None]
        most = max(one.inputs for one in encoded)
        self._most = max(self._most, most)
        if len(rows) < len(encoded):
            if all(one.is_learnt.any() for one in encoded):
                self._too_long += 1
            else:
                self._nothing_learnt += 1
            return None
        self._cut += most > self._longest
        return rows

    def counts(self, name: str) -> RowCounts:
        """Counts of all examples so far. name: of an example, in the plural. Raises SourceError where the rule is to refuse
        long ones."""
        if self._too_long and self._truncate == "refuse":
            raise SourceError(
                f"{self._too_long:,} {name} have more than {self._longest:,} tokens, the longest {self._most:,}; raise "
                "context_length, or say truncate: drop, or truncate: left"
            )
        return RowCounts(self._longest, self._too_long, self._nothing_learnt, self._cut)


def encode_answer(prompt: Turns, answer: Turns, tokenizer: Tokenizer, tools: Sequence[Message] = ()) -> Encoded:
    """A prompt and an answer, both messages or both texts.

    Messages with `"weight": 0` are read and not learnt. Raises RequestError where the template cannot be trained on, ends no
    turn, or leaves out a call of a tool; NothingLearntError where nothing is learnt.
    """
    if isinstance(prompt, str) or isinstance(answer, str):
        if not (isinstance(prompt, str) and isinstance(answer, str)):
            raise TypeError("prompt and answer must both be texts or both messages")
        before, after = tokenizer.encode(prompt), [*_continuation(prompt, answer, tokenizer), tokenizer.eos_ids[0]]
        return Encoded(np.array(before + after, np.int64), np.arange(len(before) + len(after)) >= len(before))
    ids, is_learnt = _marked([*prompt, *answer], tokenizer, tools)
    _check_calls([*prompt, *answer], ids[is_learnt], tokenizer)
    turns = _beginnings(is_learnt)

    def turns_in(messages: Sequence[Message]) -> int:
        """Not the number of its messages: a template marks nothing in an empty one."""
        return len(_beginnings(_marked(messages, tokenizer, tools)[1])) if any(map(_speaks, messages)) else 0

    spoken = turns_in(prompt)
    if len(turns) <= spoken:
        raise NothingLearntError(
            "nothing in this conversation would be learnt: the chat template marks no word of the assistant's in the answer"
        )
    is_learnt[: turns[spoken]] = False
    messages, edges = [*prompt, *answer], [*turns, len(ids)]
    for number, message in enumerate(messages):
        if _is_weightless(message):
            begin, end = turns_in(messages[:number]), turns_in(messages[: number + 1])
            is_learnt[edges[begin] : edges[end]] = False
    _check_ends(ids, is_learnt, tokenizer)
    if not is_learnt.any():
        raise NothingLearntError("nothing in this conversation would be learnt: all that the assistant says has weight 0")
    return Encoded(ids, is_learnt)


def _continuation(prompt: str, answer: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text behind another one. Alone it may be encoded otherwise: SentencePiece puts a space before a text."""
    before, joint = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    is_continued = len(joint) > len(before) and joint[: len(before)] == before
    return joint[len(before) :] if is_continued else tokenizer.encode(answer, add_bos=False)


def _marked(messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a conversation, and which of them the template marks as the assistant's."""
    # beside calls the content may be null, which templates that write no calls cannot add to a text
    ids, said = tokenizer.encode_chat([{"content": "", **message} for message in messages], tools=tools or None)
    return np.array(ids, np.int64), np.array(said, bool)


def _beginnings(is_marked: np.ndarray) -> np.ndarray:
    """Positions at which runs of marked tokens begin."""
    return np.flatnonzero(np.diff(is_marked, prepend=False) & is_marked)


def _is_weightless(message: Message) -> bool:
    return _speaks(message) and message.get("weight", 1) == 0


def _check_calls(messages: Sequence[Message], learnt_ids: np.ndarray, tokenizer: Tokenizer) -> None:
    """Check that the template writes every tool call, by its name, into the assistant's turn."""
    if not any(message.get("tool_calls") for message in messages):
        return
    written, place = tokenizer.decode(learnt_ids.tolist(), skip_special=False), 0
    for number, message in enumerate(messages, start=1):
        if not _speaks(message):
            continue
        # a name that the text only mentions is no call
        content = (message.get("content") or "").strip()
        if content and (begin := written.find(content, place)) >= 0:
            place = begin + len(content)
        for call in message.get("tool_calls") or ():
            name = call.get("function", call)["name"]
            places = [written.find(form, place) for form in (name, json.dumps(name)[1:-1])]
            if max(places) < 0:
                raise RequestError(
                    f"message {number} calls the tool {name!r}, and the model's chat template shows no such calls, so that an "
                    "answer without it would be learnt; take a model whose template has tools, or leave the row out"
                )
            place = max(places) + len(name)


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
