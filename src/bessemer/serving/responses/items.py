"""Items of a conversation in `/v1/responses`, and what they are as messages of chat completions."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from bessemer.serving.openai.tools import ToolName
from bessemer.serving.runtime.bodies import Body
from bessemer.serving.runtime.pictures import image_of_uri


class TextPart(Body):
    """A text of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] = Field(default_factory=list)


def _checked_uri(uri: str) -> str:
    image_of_uri(uri)
    return uri


class ImagePart(Body):
    """A picture of a message, as a `data:` URI: no address is fetched. detail changes nothing."""

    type: Literal["input_image"]
    image_url: Annotated[str, AfterValidator(_checked_uri)]
    detail: Literal["low", "high", "auto", "original"] | None = None

    def in_chat(self) -> dict[str, Any]:
        return {"type": "image", "image": image_of_uri(self.image_url)}


def _kind_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "ImagePart" if kind == "input_image" else "TextPart"


#: A part of a message. Errors are those of its own kind.
_Part = Annotated[Annotated[TextPart, Tag("TextPart")] | Annotated[ImagePart, Tag("ImagePart")], Discriminator(_kind_of_part)]


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


class InputMessage(Body):
    """A message of the conversation. id, status: of one that an earlier response made."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part], BeforeValidator(_as_parts)]
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def in_chat(self) -> dict[str, Any]:
        """In the form of chat completions."""
        return {"role": "system" if self.role == "developer" else self.role, "content": _joined(self.content)}


class ReasoningText(Body):
    """A text of what was thought."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Body):
    """What an earlier response thought. What is encrypted is not read."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] = Field(default_factory=list)
    encrypted_content: str | None = None
    status: str | None = None


class CallItem(Body):
    """A call that an earlier response made."""

    type: Literal["function_call"]
    call_id: str
    name: ToolName
    arguments: str
    id: str | None = None
    status: str | None = None
    namespace: str | None = None


class CallOutput(Body):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[_Part]
    id: str | None = None
    status: str | None = None


class FileSearchItem(Body):
    """A search that an earlier response made. The answer behind it holds what came of it."""

    type: Literal["file_search_call"]
    id: str | None = None
    queries: list[str] = Field(default_factory=list)
    results: list[Any] | None = None
    status: str | None = None


#: Begins the text of a compaction, of the first version of its form.
_COMPACTION = "bessemer-1:"


def encode_compaction(summary: str) -> str:
    """A summary as `encrypted_content`: encoded, not encrypted, since the conversation is its client's."""
    return base64.b64encode(f"{_COMPACTION}{summary}".encode()).decode()


def decode_compaction(text: str) -> str:
    """The summary. Raises ValueError for a text that no compaction of this server is."""
    try:
        decoded = base64.b64decode(text, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        decoded = ""
    if not decoded.startswith(_COMPACTION):
        raise ValueError("no compaction of this server has this text")
    return decoded.removeprefix(_COMPACTION)


class CompactionItem(Body):
    """A summary in place of the conversation before it, as `/v1/responses/compact` makes it."""

    type: Literal["compaction"]
    encrypted_content: Annotated[str, AfterValidator(lambda text: encode_compaction(decode_compaction(text)))]
    id: str | None = None
    created_by: str | None = None

    @property
    def text(self) -> str:
        """As the model reads it. It may hold what unknown authors wrote, so its origin is not the user."""
        return f"Summary of the conversation so far:\n{decode_compaction(self.encrypted_content)}\n\n"


_KINDS = {
    "reasoning": "ReasoningItem",
    "function_call": "CallItem",
    "function_call_output": "CallOutput",
    "file_search_call": "FileSearchItem",
    "compaction": "CompactionItem",
}


def _kind_of_item(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    # a message may have no type
    return _KINDS.get(kind, "InputMessage") if isinstance(kind, str) else "InputMessage"


#: An item of a conversation. Errors are those of its own kind.
Item = Annotated[
    Annotated[InputMessage, Tag("InputMessage")]
    | Annotated[ReasoningItem, Tag("ReasoningItem")]
    | Annotated[CallItem, Tag("CallItem")]
    | Annotated[CallOutput, Tag("CallOutput")]
    | Annotated[FileSearchItem, Tag("FileSearchItem")]
    | Annotated[CompactionItem, Tag("CompactionItem")],
    Discriminator(_kind_of_item),
]


def messages_of(items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """Messages of chat completions, where consecutive thinking, text and calls of the assistant are one message, and a summary
    belongs to the user's message behind it."""
    answer: dict[str, Any] | None = None
    remembered = ""
    for item in items:
        if isinstance(item, FileSearchItem):
            continue
        if isinstance(item, CompactionItem):
            if answer is not None:
                yield answer
                answer = None
            remembered += item.text
            continue
        if remembered:
            users = item if isinstance(item, InputMessage) and item.role == "user" else None
            yield {"role": "user", **({"content": ""} if users is None else users.in_chat()), "remembered": remembered}
            remembered = ""
            if users is not None:
                continue
        is_assistants = isinstance(item, ReasoningItem | CallItem) or (
            isinstance(item, InputMessage) and item.role == "assistant" and (answer is None or not answer["content"])
        )
        if not is_assistants:
            if answer is not None:
                yield answer
                answer = None
            if isinstance(item, CallOutput):
                yield {"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)}
            elif isinstance(item, InputMessage) and item.role == "assistant":
                answer = item.in_chat()
            elif isinstance(item, InputMessage):
                yield item.in_chat()
            continue
        answer = answer or {"role": "assistant", "content": ""}
        match item:
            case InputMessage():
                answer["content"] = _joined(item.content)
            case ReasoningItem():
                answer["reasoning_content"] = answer.get("reasoning_content", "") + "".join(part.text for part in item.content)
            case CallItem():
                function = {"name": item.name, "arguments": item.arguments}
                answer.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    if answer is not None:
        yield answer
    if remembered:
        yield {"role": "user", "content": "", "remembered": remembered}


def _joined(content: str | Sequence[TextPart | ImagePart]) -> str | list[dict[str, Any]]:
    """The content of a message: a text, or parts where there are pictures."""
    if isinstance(content, str):
        return content
    if any(isinstance(part, ImagePart) for part in content):
        return [part.in_chat() if isinstance(part, ImagePart) else {"type": "text", "text": part.text} for part in content]
    return "".join(part.text for part in content if isinstance(part, TextPart))


def _text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "(a picture)") for part in content)


def _calls_in_words(message: Mapping[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return "".join(f"\n(calls {call['name']} with {call['arguments']})" for call in calls)


def transcript(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation in the form of chat completions as a text."""
    lines = []
    for message in messages:
        said = message.get("remembered", "") + _text_of(message.get("content", ""))
        lines.append(f"{message['role']}: {said}{_calls_in_words(message)}")
    return "\n".join(lines)
