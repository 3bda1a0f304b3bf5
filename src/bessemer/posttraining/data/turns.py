"""A conversation as a model is trained on it: each turn of the assistant after the context that a server renders before it.

The context of a turn is what the server renders when the turn is asked for, thinking of earlier turns kept or dropped as the
model's template does. The target is what the model then has to write, up to its end token: in the template's own words where
the parser of answers reads them as the message, else as the model's format of calls and thinking is written. Turns whose
contexts extend each other are one example, so that a conversation is one with a template that only appends; with one that
rewrites earlier turns, such as Qwen3's, each turn is an example of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from bessemer.assistant.conversation import with_system_in_place
from bessemer.assistant.messages import Message, MessagePart, as_messages, with_call_ids, with_one_call_each, with_short_ids
from bessemer.assistant.tool_formats import ToolFormat, format_of
from bessemer.assistant.written import Piece, calls_of, reads_back, schemas_of
from bessemer.core.errors import RequestError
from bessemer.posttraining.data.formats import Message as Row
from bessemer.tokenization.chat import Segment
from bessemer.tokenization.chat_templates import template_name
from bessemer.tokenization.chat_turns import ChatTurns, Reply
from bessemer.tokenization.tokenizer import Tokenizer


class RowError(RequestError):
    """A row that cannot be trained on, with the reason in one line: the template refuses it, or does not render a call in
    it."""


class NothingLearntError(RequestError):
    """An example without a token to learn, because of the chat template or of the messages' weights."""


class Turn(NamedTuple):
    """A turn of the assistant. target: its segments with the end token; `is_assistant` marks those that are learnt."""

    context: Sequence[Segment]
    target: Sequence[Segment]


class Part(NamedTuple):
    """A run of segments, and whether it is learnt."""

    segments: list[Segment]
    is_learnt: bool


#: (ids, whether each is learnt), (N,) int64 and bool.
LearntIds = tuple[np.ndarray, np.ndarray]


@dataclass
class Example:
    """Turns whose contexts extend each other. turns: one by one. parts: those of all turns, in order."""

    turns: list[Turn] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def segments(self) -> list[Segment]:
        return [segment for part in self.parts for segment in part.segments]

    def add(self, before: Sequence[Segment], turn: Turn) -> None:
        """Add a turn. before: the segments between the last one and its target."""
        self.turns.append(turn)
        self.parts.append(Part(list(before), False))
        for segment in turn.target:
            self.append(segment, segment.is_assistant)

    def append(self, segment: Segment, is_learnt: bool) -> None:
        """Add a segment to the last part, or to a new one if the last is of the other kind."""
        if not self.parts or self.parts[-1].is_learnt != is_learnt:
            self.parts.append(Part([], is_learnt))
        self.parts[-1].segments.append(segment)

    def encoded(self, tokenizer: Tokenizer) -> LearntIds | None:
        """The example encoded as one text; None if a token would span two parts, since contexts of later turns would then have
        other ids."""
        parts = self._filled
        ids = tokenizer.encode_together([part.segments for part in parts])
        return None if ids is None else _joined(ids, parts)

    def encoded_apart(self, tokenizer: Tokenizer) -> LearntIds:
        """The example encoded in steps: the first context as one text, then each part as it is appended to existing tokens."""
        parts = self._filled
        return _joined(tokenizer.encode_apart([part.segments for part in parts]), parts)

    @property
    def _filled(self) -> list[Part]:
        return [part for part in self.parts if part.segments]


def _joined(ids: Sequence[Sequence[int]], parts: Sequence[Part]) -> LearntIds:
    learnt = [np.full(len(of_part), part.is_learnt) for of_part, part in zip(ids, parts, strict=True)]
    return np.concatenate([np.array(of_part, np.int64) for of_part in ids]), np.concatenate(learnt)


class TrainedConversation:
    """The turns of a conversation, rendered for training."""

    def __init__(self, messages: Sequence[Row], tokenizer: Tokenizer, tools: Sequence[Row] = ()) -> None:
        """Raises RequestError for malformed messages."""
        self._tokenizer = tokenizer
        self._format: ToolFormat = format_of(tokenizer)
        self._tools = list(tools)
        spoken = iter([number for number, message in enumerate(messages) if message["role"] == "assistant"])
        before = served_messages(messages, tokenizer)
        numbers = {place: next(spoken) for place, message in enumerate(before) if message.role == "assistant"}
        placed = with_one_call_each(before) if self._format.one_call else list(enumerate(before))
        self._messages = [message for _, message in placed]
        #: For each of these messages its number among the given ones; −1 if it is none of them.
        self._numbers = [numbers.get(place, -1) for place, _ in placed]
        self._places = [place for place, message in enumerate(self._messages) if message.role == "assistant"]

    @cached_property
    def _turns(self) -> ChatTurns:
        inputs = template_inputs(self._messages)
        return self._tokenizer.chat_turns(inputs, self._tools or None)

    def encoded(self, is_learnt: Callable[[int], bool], *, at_once: bool = False) -> list[LearntIds]:
        """The examples of the turns that are learnt, in order. is_learnt: whether the message with a number is learnt. at_once:
        give one example of all turns, as in a server that keeps a conversation's tokens and appends to them, even where a
        turn's context does not extend the previous one. Raises RowError for what cannot be rendered, and NothingLearntError
        where `{% generation %}` marks nothing.
        """
        if (whole := self._marked_whole(is_learnt)) is not None and (ids := whole.encoded(self._tokenizer)) is not None:
            return [ids]
        found: list[LearntIds] = []
        for example in self._rendered(is_learnt, at_once):
            together = example.encoded(self._tokenizer)
            if together is not None:
                found.append(together)
            elif at_once:
                found.append(example.encoded_apart(self._tokenizer))
            else:
                for turn in example.turns:
                    alone = Example()
                    alone.add(turn.context, turn)
                    found.append(alone.encoded_apart(self._tokenizer))
        return found

    def _rendered(self, is_learnt: Callable[[int], bool], at_once: bool) -> list[Example]:
        """The examples. Calls keep the ids of the data, unless the template refuses these; then they get ours."""
        try:
            return self._examples(is_learnt, at_once)
        except RowError:
            raise
        except RequestError as error:
            if isinstance(error, NothingLearntError):
                raise
            shorter = with_short_ids(self._messages)
            if shorter == self._messages:
                raise RowError(str(error)) from None
        self._messages = shorter
        vars(self).pop("_turns", None)
        try:
            return self._examples(is_learnt, at_once)
        except NothingLearntError:
            raise
        except RequestError as error:
            raise RowError(str(error)) from None

    def turn(self, index: int) -> Turn:
        """The assistant's turn at message `index`. Raises RowError and RequestError as `examples`."""
        message, context = self._messages[index], self._turns.context(index)
        reply = self._turns.reply(index, self._format.thinking.opening, self._format.inner_tags - self._tokenizer.end_tokens)
        before = "".join(segment.text for segment in context[-_END_OF_CONTEXT:])
        is_open = before.rstrip().endswith(self._format.thinking.opening)
        body, is_own = self._body(message, reply, is_open)
        end = reply.segments[-1] if reply is not None and reply.has_end else self._end(index)
        if not is_own or not self._tokenizer.marks_generation:
            body = [segment._replace(is_assistant=True) for segment in body]
        return Turn(context, [*body, end._replace(is_assistant=True)])

    def _examples(self, is_learnt: Callable[[int], bool], at_once: bool) -> list[Example]:
        examples: list[Example] = []
        last = -1
        learnt = [place for place in self._places if is_learnt(self._numbers[place])]
        if learnt[0] == 0 and len(learnt) > 1 and not self._may_begin:
            # no server renders this turn: it has no message before it, and the template needs one
            del learnt[0]
        for index in learnt:
            turn = self.turn(index)
            before = _behind(examples[-1].segments, turn.context) if examples else None
            if before is None and examples and at_once:
                _, *before = self._turns.bridge(last, index, self._tokenizer.end_tokens)
            if before is None:
                examples.append(Example())
                before = list(turn.context)
            examples[-1].add(before, turn)
            last = index
        if len(examples) == 1 and (rest := self._rest(examples[0])):
            examples[0].parts.append(Part(rest, False))
        return examples

    @property
    def _may_begin(self) -> bool:
        """Whether the template renders a prompt without messages, so that the assistant may speak first."""
        try:
            self._turns.context(0)
        except RequestError:
            return False
        return True

    def _marked_whole(self, is_learnt: Callable[[int], bool]) -> Example | None:
        """The whole conversation rendered at once, for our own templates: these only append, and leave out nothing but
        thinking."""
        text = self._tokenizer.chat_template
        if text is None or template_name(text) is None or any(self._messages[place].thinking for place in self._places):
            return None
        try:
            segments = self._turns.whole()
        except RequestError as error:
            raise RowError(str(error)) from None
        example, number, was_assistant = Example(), -1, False
        for segment in segments:
            number += segment.is_assistant and not was_assistant
            was_assistant = segment.is_assistant
            example.append(segment, was_assistant and is_learnt(self._numbers[self._places[number]]))
        return example

    def _rest(self, example: Example) -> list[Segment]:
        """What the whole conversation's rendering has after an example: white space, and turns that are not learnt."""
        try:
            return _behind(example.segments, self._turns.whole()) or []
        except RequestError:
            return []

    def _body(self, message: Message, reply: Reply | None, is_open: bool) -> tuple[list[Segment], bool]:
        """A message's text without its end token, and whether the template wrote all of it. The template's text is used if the
        parser reads it as this message, with thinking added before it where the template leaves that out; else the text is
        written by the format."""
        schemas = schemas_of(self._tools, message)
        if reply is not None:
            body = list(reply.segments[: len(reply.segments) - reply.has_end])
            if self._tokenizer.marks_generation and not any(segment.is_assistant for segment in reply.segments):
                raise NothingLearntError(
                    "nothing in this conversation would be learnt: the chat template marks no word of the assistant's in the "
                    "answer"
                )
            own = self._said(body)
            if not reply.opened and self._reads_back(own, message, schemas, is_open):
                return body, True
            before = self._segments(self._format.written_thinking(message.thinking.strip(), is_open=is_open))
            if before and self._reads_back(self._said(before) + own, message, schemas, is_open):
                return [*before, *body], False
        thinking, text, calls = message.thinking.strip(), message.text.strip(), calls_of(message)
        try:
            pieces = self._format.written(thinking, text, calls, is_open=is_open)
        except ValueError as error:
            raise RowError(f"the model's chat template leaves out what the assistant says, and {error}") from None
        return self._segments(pieces), False

    def _said(self, body: Sequence[Segment]) -> str:
        """The text of a message that is learnt."""
        return "".join(segment.text for segment in body if segment.is_assistant or not self._tokenizer.marks_generation)

    def _reads_back(self, written: str, message: Message, schemas: Any, is_open: bool) -> bool:
        if not message.thinking and not message.calls and not is_open and written.strip() == message.text.strip():
            return True
        return reads_back(written, message, self._format.parser(schemas or None, in_thinking=is_open))

    def _segments(self, pieces: Sequence[Piece]) -> list[Segment]:
        return [Segment(text, is_tag and self._tokenizer.control_id(text) is not None, True) for text, is_tag in pieces if text]

    def _end(self, index: int) -> Segment:
        try:
            return self._turns.end(index, self._tokenizer.end_tokens)
        except RequestError:
            raise RowError(
                "the chat template ends what the assistant says by no control token, so that a model would not learn to stop"
            ) from None


#: Segments at the end of a context in which thinking may open.
_END_OF_CONTEXT = 4


def served_messages(given: Sequence[Row], tokenizer: Tokenizer) -> list[Message]:
    """Messages as a server holds them: arguments of calls as objects, ids for calls, thinking apart from the text, system
    messages where the template takes them. Raises RequestError for malformed messages."""
    tool_format = format_of(tokenizer)
    messages = [
        _with_thinking_apart(message, tool_format) for message in as_messages([{"content": "", **one} for one in given])
    ]
    return with_call_ids(with_system_in_place(messages, tokenizer))


def template_inputs(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages for a chat template."""
    return [message.as_template_input() for message in messages]


def prompt_inputs(given: Sequence[Row], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The messages of a prompt for the chat template, as a server gives them. Raises RequestError for malformed messages."""
    messages = served_messages(given, tokenizer)
    if format_of(tokenizer).one_call:
        messages = [message for _, message in with_one_call_each(messages)]
    return template_inputs(messages)


def _with_thinking_apart(message: Message, tool_format: ToolFormat) -> Message:
    """A message of the assistant with the thinking in tags at its beginning, as many data sets write it, moved out of its
    text."""
    tags = tool_format.thinking
    text = message.text.lstrip()
    if message.role != "assistant" or message.thinking or tags.answer or not text.startswith(tags.opening):
        return message
    thought, closing, rest = text[len(tags.opening) :].partition(tags.closing)
    if not closing:
        return message
    said = rest.lstrip()
    return replace(message, thinking=thought.strip(), parts=(MessagePart(said, "assistant"),) if said else ())


def _behind(first: Sequence[Segment], whole: Sequence[Segment]) -> list[Segment] | None:
    """The segments of `whole` after those of `first`; None if it does not begin with them. A control token differs from the
    same characters in a text."""
    if not _key(whole).startswith(_key(first)):
        return None
    skipped = sum(len(segment.text) for segment in first)
    rest: list[Segment] = []
    for segment in whole:
        if skipped < len(segment.text):
            rest.append(segment._replace(text=segment.text[skipped:], is_assistant=False))
        skipped = max(skipped - len(segment.text), 0)
    return rest


def _key(segments: Sequence[Segment]) -> str:
    return "".join(f"\0{text}\0" if is_control else text.replace("\0", "\0\0") for text, is_control, _ in segments)
