"""The turns of a conversation one by one: what is served to the model before each, and what its template writes for it.

Some templates write earlier turns otherwise once more follows (Qwen3 drops their thinking), or write a finished turn otherwise
than they open one (DeepSeek-R1 opens thinking in the generation prompt, and leaves it out of a finished message). So the
context of a turn is rendered by itself, as a server renders it, and the turn is located in the rendering that ends with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from bessemer.core.errors import RequestError
from bessemer.tokenization.chat import (
    ChatTemplate,
    EscapedConversation,
    Message,
    Segment,
    Tool,
    checked_messages,
    checked_tools,
)


class Reply(NamedTuple):
    """What the template writes for an assistant's message, behind the context of its turn.

    segments: with the token that ends the turn, where the template writes one. opened: the text at the end of the context that
    the template leaves out before a finished message, because it opens thinking; empty for most.
    """

    segments: tuple[Segment, ...]
    has_end: bool
    opened: str


class ChatTurns:
    """A conversation, and the rendering of its turns."""

    def __init__(self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> None:
        """Raises RequestError for malformed messages or tools."""
        self._template = template
        self._messages = checked_messages(messages)
        self._tools = checked_tools(tools)
        self._conversation = EscapedConversation(template, self._messages, self._tools)

    def context(self, index: int) -> list[Segment]:
        """The messages before one of the assistant's, up to where it speaks: the prompt of its turn. Raises RequestError for
        what the template refuses."""
        return self._conversation.segments(self._conversation.render(True, index))

    def whole(self) -> list[Segment]:
        """The whole conversation. Raises RequestError as `context`."""
        return self._conversation.segments(self._conversation.render(False))

    def reply(self, index: int, thinking: str, inner: Collection[str]) -> Reply | None:
        """What the template writes for the assistant's message `index`, when it is the last; None where it writes it elsewhere
        than behind the context.

        thinking: the tag that opens thinking. inner: control tokens that end no turn. Raises RequestError as `context`.
        """
        context = _Plain.of(self._conversation, self._conversation.render(True, index))
        through = _Plain.of(self._conversation, self._conversation.render(False, index + 1))
        begin, opened = len(context.text), ""
        if not through.text.startswith(context.text):
            opened = _opened(context.text, thinking)
            shown = context.text[: len(context.text) - len(opened)]
            place = self._behind(shown, through.text, index)
            if place is None:
                return None
            begin = place
        segments = through.segments(begin)
        end = self._end(segments, inner)
        kept = segments if end is None else segments[: end + 1]
        put_back = [one if one.is_control else one._replace(text=self._conversation.put_back(one.text)) for one in kept]
        return Reply(tuple(put_back), end is not None, self._conversation.put_back(opened))

    def end(self, index: int, end_tokens: Collection[str]) -> Segment:
        """The token that ends the assistant's turn `index`, where the template writes it with what follows, as GLM's does.
        Raises RequestError where there is none."""
        return self.bridge(index, None, end_tokens)[0]

    def bridge(self, index: int, until: int | None, end_tokens: Collection[str]) -> list[Segment]:
        """The segments behind the assistant's message `index`, from its end token up to where the assistant speaks in message
        `until`; None: after one message more. Raises RequestError for a template without an end token."""
        messages = self._messages[: index + 1 if until is None else until]
        return self._template.following([*messages, *([] if until else [self._next(index)])], index, end_tokens, self._tools)

    def _next(self, index: int) -> dict[str, Any]:
        """A message that may stand behind one of the assistant's: a tool's result behind a call."""
        calls = self._messages[index].get("tool_calls")
        if not calls:
            return {"role": "user", "content": "-"}
        call: Mapping[str, Any] = calls[0]
        function: Mapping[str, Any] = call.get("function", call)
        return {"role": "tool", "content": "-", "name": function["name"], "tool_call_id": call.get("id", "")}

    def _behind(self, context: str, through: str, index: int) -> int | None:
        """Where a message begins in a rendering that writes what is before it otherwise than its context: behind the last
        control token of the context, and the text that follows it there."""
        placeholder = {"role": "assistant", "content": self._conversation.free()}
        try:
            other = self._conversation.rendered_with(index, placeholder)
        except RequestError:
            return None
        pairs = zip(through, _Plain.of(self._conversation, other).text, strict=False)
        same = next((place for place, (one, another) in enumerate(pairs) if one != another), len(through))
        tail = context[self._conversation.last_control(context) :]
        place = through.rfind(tail, 0, same) if tail else -1
        return None if place < 0 else place + len(tail)

    def _end(self, segments: Sequence[Segment], inner: Collection[str]) -> int | None:
        """The position of the control token that ends a turn: the last segment but white space."""
        for place in range(len(segments) - 1, -1, -1):
            segment = segments[place]
            if segment.is_control:
                return None if segment.text in inner else place
            if segment.text.strip():
                return None
        return None


def _opened(context: str, thinking: str) -> str:
    """The end of a context that opens thinking; empty where it opens none."""
    return context[context.rindex(thinking) :] if thinking and context.rstrip().endswith(thinking) else ""


class _Plain(NamedTuple):
    """A rendering without marks, with stand-ins. pieces: it cut at control tokens and marks."""

    text: str
    pieces: list[Segment]

    @classmethod
    def of(cls, conversation: EscapedConversation, rendered: str) -> _Plain:
        pieces = list(conversation.pieces(rendered))
        return cls("".join(piece.text for piece in pieces), pieces)

    def segments(self, begin: int) -> list[Segment]:
        """The pieces from a position on."""
        found: list[Segment] = []
        place = 0
        for piece in self.pieces:
            after = place + len(piece.text)
            if after > begin:
                cut = max(begin - place, 0)
                found.append(piece._replace(text=piece.text[cut:], is_control=piece.is_control and not cut))
            place = after
        return found
