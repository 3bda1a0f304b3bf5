"""Encoding of examples for every method: the token ids of a prompt and an answer, which tokens are learnt, and how examples
that are longer than a row are cut or left out.

The model learns what the assistant says, its calls of tools, and the control token that ends its turn; with a prompt and an
answer, only those in the answer. Of texts without roles it learns the answer and the end token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bessemer.core.errors import RequestError, SourceError
from bessemer.posttraining.data.formats import NO_PICTURES, Message, Turns
from bessemer.posttraining.data.made import Truncate
from bessemer.posttraining.data.picture_rows import has_pictures
from bessemer.posttraining.data.turns import (
    NothingLearntError,
    RowError,
    TrainedConversation,
    prompt_inputs,
)
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batch import IGNORE_INDEX

#: Inputs and targets, of equal length; -100 marks a token without a target.
Row = tuple[np.ndarray, np.ndarray]


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

        A longer example gives None; with `left` it gives its last tokens. A turn of the assistant that is cut at its beginning
        becomes context; whole turns are learnt with their end. The end is never cut off, since the model would not learn to
        stop. Tokens after the last target may be dropped.
        """
        ids, is_learnt = self.ids[: longest + 1], self.is_learnt[: longest + 1]
        if self.inputs > longest:
            if truncate != "left":
                return None
            first = self.inputs - longest
            ids, is_learnt = self.through_end()[first:], self.is_learnt[first : self.inputs + 1].copy()
            # the first token is no target, so a turn that begins with it is not whole
            (unlearnt,) = np.nonzero(~is_learnt)
            is_learnt[: unlearnt[0] if len(unlearnt) else None] = False
        if not is_learnt[1:].any():
            return None
        return ids[:-1], np.where(is_learnt, ids, IGNORE_INDEX)[1:]

    def windows(self, longest: int) -> list[Encoded]:
        """Consecutive windows of at most `longest` inputs over a text that is learnt whole: every token except the first is a
        target once."""
        return [
            Encoded(self.ids[begin : begin + longest + 1], self.is_learnt[begin : begin + longest + 1])
            for begin in range(0, max(len(self.ids) - 1, 1), longest)
        ]

    def through_end(self) -> np.ndarray:
        """The ids up to the answer's end token, its last learnt one; a template may write more after it."""
        return self.ids[: self.inputs + 1]

    def beginning(self, longest: int) -> Row | None:
        """(inputs, targets) of the first `longest` tokens, for estimates over answers that are not learnt. None when no target
        is left."""
        ids, is_learnt = self.ids[: longest + 1], self.is_learnt[: longest + 1]
        return (ids[:-1], np.where(is_learnt, ids, IGNORE_INDEX)[1:]) if is_learnt[1:].any() else None

    def scored(self, longest: int) -> Row | None:
        """(inputs, targets) for scoring the answer: all tokens up to its end token, whose position is the only one with a
        target, the end token itself. None where these are more than `longest` tokens, since a score before the end would be of
        another answer.
        """
        ids = self.through_end()
        if len(ids) > longest:
            return None
        targets = np.full(len(ids), IGNORE_INDEX, np.int64)
        targets[-1] = ids[-1]
        return ids, targets


class Unrendered(NamedTuple):
    """A row that the model's template cannot render, or refuses. place: its file and line, empty where unknown."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" if self.place else self.reason


#: Largest share of rows that may be left out because the template cannot render them, and a number that always may.
MOST_UNRENDERED, _FEW_UNRENDERED = 0.05, 2


@dataclass(frozen=True)
class RowCounts:
    """Counts of examples. too_long, nothing_learnt, unrendered: those left out, by reason. cut: those kept without their
    beginning. turns_left_out: turns too long for a row, of examples that are kept. longest: tokens of a row. total: all
    examples."""

    longest: int
    too_long: int = 0
    nothing_learnt: int = 0
    cut: int = 0
    turns_left_out: int = 0
    unrendered: tuple[Unrendered, ...] = ()
    total: int = 0

    @property
    def left_out(self) -> int:
        """Number of examples left out, for any reason."""
        return self.too_long + self.nothing_learnt + len(self.unrendered)

    @property
    def figures(self) -> dict[str, int]:
        """For a stage's metrics."""
        more = {"turns_left_out": self.turns_left_out, "unrendered": len(self.unrendered)}
        figures = {"too_long": self.too_long, "nothing_learnt": self.nothing_learnt, "cut": self.cut}
        return figures | {name: number for name, number in more.items() if number}

    def sentences(self, of: str) -> list[str]:
        """A sentence for each count above zero. of: the number and name of all examples, such as `1,000 conversations`."""
        within = f"{self.longest:,} tokens"
        said = {
            f"are left out: longer than {within} (truncate: drop)": self.too_long,
            "are left out: the assistant says nothing in them that is learnt": self.nothing_learnt,
            f"are longer than {within}, and their beginning is cut off (truncate: left)": self.cut,
        }
        sentences = [f"  {number:,} of {of} {what}" for what, number in said.items() if number]
        if self.turns_left_out:
            sentences.append(f"  {self.turns_left_out:,} turns of others are left out: longer than {within} with their context")
        if self.unrendered:
            sentences.append(f"  {len(self.unrendered):,} of {of} are left out: {self._reasons()}")
        return sentences

    def _reasons(self) -> str:
        """The first row that was not rendered with its reason, and the places of some others."""
        first, *others = self.unrendered
        if not others:
            return str(first)
        places = ", ".join(one.place for one in others[:_NAMED_ROWS] if one.place)
        more = ", …" if len(others) > _NAMED_ROWS else ""
        return f"{first}; {len(others):,} more{f' ({places}{more})' if places else ''}"

    def check(self, name: str) -> None:
        """Raise SourceError where too many examples cannot be rendered, or nothing is learnt from any. name: an example's name
        in the plural."""
        if self.total and self.nothing_learnt == self.total:
            raise SourceError(
                f"nothing would be learnt of any of the {self.total:,} {name}: the mask of what the assistant says is empty; "
                "look at the weights of messages, and at {% generation %} in the model's chat template"
            )
        number = len(self.unrendered)
        if number and (number == self.total or number > max(_FEW_UNRENDERED, MOST_UNRENDERED * self.total)):
            raise SourceError(
                f"{number:,} of {self.total:,} {name} cannot be written by the model's chat template: {self._reasons()}; take "
                "them out, or take another model"
            )


#: Most places of left-out rows that a message lists after the first one, which it quotes.
_NAMED_ROWS = 5


class RowFitter:
    """Fits examples into rows of at most `longest` tokens by a rule, and counts the results.

    example: gives inputs and targets of an encoded example, or None if it does not fit a number of tokens; by default
    `Encoded.example` with the rule.
    """

    def __init__(
        self, longest: int, truncate: Truncate = "drop", example: Callable[[Encoded, int], Row | None] | None = None
    ) -> None:
        self._longest = longest
        self._truncate: Truncate = truncate
        self._example = example or (lambda encoded, longest: encoded.example(longest, truncate))
        self._too_long, self._nothing_learnt, self._cut, self._turns, self._total = 0, 0, 0, 0, 0
        self._unrendered: list[Unrendered] = []
        self._most = 0

    def fit(self, *encode: Callable[[], Encoded], place: str = "") -> list[Row] | None:
        """Rows of encoded examples; None unless all of them fit. place: the file and line that they come from."""
        encoded = self._encoded(lambda: [one() for one in encode], place)
        if encoded is None:
            return None
        rows = self._rows(encoded)
        if len(rows) < len(encoded):
            self._count_missing(encoded)
            return None
        self._cut += max(one.inputs for one in encoded) > self._longest
        return rows

    def fit_turns(self, encode: Callable[[], list[Encoded]], place: str = "") -> list[Row]:
        """Rows of those examples of one conversation that fit."""
        encoded = self._encoded(encode, place)
        if encoded is None:
            return []
        rows = self._rows(encoded)
        if not rows:
            self._count_missing(encoded)
            return []
        self._turns += len(encoded) - len(rows)
        self._cut += len(rows) == len(encoded) and max(one.inputs for one in encoded) > self._longest
        return rows

    def _encoded(self, encode: Callable[[], list[Encoded]], place: str) -> list[Encoded] | None:
        """The encoded examples; None where the row cannot be rendered or nothing in it is learnt, which is counted."""
        self._total += 1
        try:
            encoded = encode()
        except NothingLearntError:
            self._nothing_learnt += 1
            return None
        except RowError as error:
            self._unrendered.append(Unrendered(place, str(error)))
            return None
        self._most = max(self._most, *(one.inputs for one in encoded))
        return encoded

    def _rows(self, encoded: Sequence[Encoded]) -> list[Row]:
        return [row for one in encoded if (row := self._example(one, self._longest)) is not None]

    def _count_missing(self, encoded: Sequence[Encoded]) -> None:
        if all(one.is_learnt.any() for one in encoded):
            self._too_long += 1
        else:
            self._nothing_learnt += 1

    def counts(self, name: str) -> RowCounts:
        """Counts of all examples so far. name: of an example, in the plural. Raises SourceError where the rule is to refuse
        long ones, and as `RowCounts.check`."""
        if self._too_long and self._truncate == "refuse":
            raise SourceError(
                f"{self._too_long:,} {name} have more than {self._longest:,} tokens, the longest {self._most:,}; raise "
                "context_length, or say truncate: drop, or truncate: left"
            )
        counts = RowCounts(
            self._longest,
            self._too_long,
            self._nothing_learnt,
            self._cut,
            self._turns,
            tuple(self._unrendered),
            self._total,
        )
        counts.check(name)
        return counts


def encode_answer(
    prompt: Turns, answer: Turns, tokenizer: Tokenizer, tools: Sequence[Message] = (), *, pictures: bool = False
) -> Encoded:
    """A prompt and an answer, both messages or both texts, as one example: the prompt as it is served, and all that the
    assistant says in the answer.

    Several turns of an answer follow each other as in a conversation whose tokens are only appended to. Messages with
    `"weight": 0` are context and not learnt. Raises RowError where the model's template cannot render or refuses the messages,
    NothingLearntError where nothing is learnt.
    pictures: whether these may hold pictures, each of which is then one token.
    """
    _check_pictures(prompt, answer, allowed=pictures)
    if isinstance(prompt, str) or isinstance(answer, str):
        if not (isinstance(prompt, str) and isinstance(answer, str)):
            raise TypeError("prompt and answer must both be texts or both messages")
        return _encode_text(prompt, answer, tokenizer)
    (encoded,) = _encode_messages(prompt, answer, tokenizer, tools, at_once=True)
    return encoded


def encode_turns(
    prompt: Turns, answer: Turns, tokenizer: Tokenizer, tools: Sequence[Message] = (), *, pictures: bool = False
) -> list[Encoded]:
    """As `encode_answer`, as one example for each different context in serving: a single one if the template only appends, one
    for each turn if it rewrites earlier turns."""
    _check_pictures(prompt, answer, allowed=pictures)
    if isinstance(prompt, str) or isinstance(answer, str):
        return [encode_answer(prompt, answer, tokenizer, tools)]
    return _encode_messages(prompt, answer, tokenizer, tools, at_once=False)


def _check_pictures(*turns: Turns, allowed: bool) -> None:
    """Raise RowError for pictures where their tokens alone would be read."""
    if not allowed and any(map(has_pictures, turns)):
        raise RowError(NO_PICTURES)


def _encode_text(prompt: str, answer: str, tokenizer: Tokenizer) -> Encoded:
    before, after = tokenizer.encode(prompt), [*_continuation(prompt, answer, tokenizer), tokenizer.eos_ids[0]]
    return Encoded(np.array(before + after, np.int64), np.arange(len(before) + len(after)) >= len(before))


def _encode_messages(
    prompt: Sequence[Message], answer: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Message], *, at_once: bool
) -> list[Encoded]:
    messages = [*prompt, *answer]
    learnt = {
        number
        for number, message in enumerate(messages)
        if number >= len(prompt) and message["role"] == "assistant" and message.get("weight", 1) != 0
    }
    if not learnt:
        said = any(message["role"] == "assistant" for message in answer)
        why = "all that the assistant says has weight 0" if said else "the assistant says nothing in the answer"
        raise NothingLearntError(f"nothing in this conversation would be learnt: {why}")
    conversation = TrainedConversation(messages, tokenizer, tools)
    return [Encoded(*ids) for ids in conversation.encoded(learnt.__contains__, at_once=at_once)]


def _continuation(prompt: str, answer: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text that follows another one. They may differ from the text's own: SentencePiece puts a space before a
    text."""
    before, joint = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    is_continued = len(joint) > len(before) and joint[: len(before)] == before
    return joint[len(before) :] if is_continued else tokenizer.encode(answer, add_bos=False)


def encode_prompt(prompt: Turns, tokenizer: Tokenizer, tools: Sequence[Message] = (), *, pictures: bool = False) -> list[int]:
    """The ids of a prompt, up to where the answer begins, as a server renders it. Raises RowError for messages that the model's
    template refuses. pictures: as in `encode_answer`."""
    _check_pictures(prompt, allowed=pictures)
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    try:
        messages = prompt_inputs(prompt, tokenizer)
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools or None)
    except RequestError as error:
        raise RowError(str(error)) from None
