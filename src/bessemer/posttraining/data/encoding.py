"""Encoding of examples for every method: the token ids of a prompt and an answer, which of them are learnt, and what becomes of
examples that are longer than a row.

Learnt is what the assistant says, its calls of tools and the control token that ends its turn; of an answer to a prompt, only
what it says in the answer. Of texts without roles it is the answer and the end token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bessemer.core.errors import RequestError, SourceError
from bessemer.posttraining.data.formats import Message, Turns
from bessemer.posttraining.data.made import Truncate
from bessemer.posttraining.data.turns import (
    NothingLearntError,
    RowError,
    TrainedConversation,
    prompt_inputs,
)
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import IGNORE_INDEX

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

    def windows(self, longest: int) -> list[Encoded]:
        """A text that is learnt whole, in windows of at most `longest` inputs, one behind the other: every token but the first
        is a target of one of them."""
        return [
            Encoded(self.ids[begin : begin + longest + 1], self.is_learnt[begin : begin + longest + 1])
            for begin in range(0, max(len(self.ids) - 1, 1), longest)
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


class Unrendered(NamedTuple):
    """A row that the model's template cannot write, or refuses. place: its file and line, empty where unknown."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" if self.place else self.reason


#: Share of the rows that may be left out because the template cannot write them; one or two may always be.
MOST_UNRENDERED, _FEW_UNRENDERED = 0.05, 2


@dataclass(frozen=True)
class RowCounts:
    """Counts of examples. too_long, nothing_learnt, unrendered: left out. cut: kept without their beginning. turns_left_out: of
    examples that are kept, whose other turns are within a row. longest: tokens of a row. total: of all examples."""

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
        """A sentence for each count above zero. of: all examples, as in `1,000 conversations`."""
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
        """Raise SourceError where too many cannot be rendered, or nothing is learnt of any. name: of an example, in the
        plural."""
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

    example: inputs and targets of what is encoded, or None where that is not within a number of tokens; `Encoded.example` by
    the rule where nothing is said.
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
        """Rows of encoded examples; None unless all of them fit. place: of the row that they are of."""
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
        """Rows of the examples that one conversation gives; those that fit."""
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
        """What is encoded; None, and counted, where it cannot be, or nothing is learnt."""
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


def encode_answer(prompt: Turns, answer: Turns, tokenizer: Tokenizer, tools: Sequence[Message] = ()) -> Encoded:
    """A prompt and an answer, both messages or both texts, as one example: the prompt as it is served, and all that the
    assistant says in the answer.

    Of several turns in an answer, each after the first follows the one before it as in a conversation that is kept in tokens.
    Messages with `"weight": 0` are read and not learnt. Raises RowError for what the model's template cannot write or refuses,
    NothingLearntError where nothing is learnt.
    """
    if isinstance(prompt, str) or isinstance(answer, str):
        if not (isinstance(prompt, str) and isinstance(answer, str)):
            raise TypeError("prompt and answer must both be texts or both messages")
        return _encode_text(prompt, answer, tokenizer)
    (encoded,) = _encode_messages(prompt, answer, tokenizer, tools, at_once=True)
    return encoded


def encode_turns(prompt: Turns, answer: Turns, tokenizer: Tokenizer, tools: Sequence[Message] = ()) -> list[Encoded]:
    """As `encode_answer`, in as many examples as there are contexts that are served: one where the template only appends, one
    for each turn where it rewrites earlier ones."""
    if isinstance(prompt, str) or isinstance(answer, str):
        return [encode_answer(prompt, answer, tokenizer, tools)]
    return _encode_messages(prompt, answer, tokenizer, tools, at_once=False)


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
    """The ids of a text behind another one. Alone it may be encoded otherwise: SentencePiece puts a space before a text."""
    before, joint = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    is_continued = len(joint) > len(before) and joint[: len(before)] == before
    return joint[len(before) :] if is_continued else tokenizer.encode(answer, add_bos=False)


def encode_prompt(prompt: Turns, tokenizer: Tokenizer, tools: Sequence[Message] = ()) -> list[int]:
    """The ids of a prompt, up to where the answer begins, as a server renders it. Raises RowError for messages that the model's
    template refuses."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    try:
        messages = prompt_inputs(prompt, tokenizer)
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools or None)
    except RequestError as error:
        raise RowError(str(error)) from None
