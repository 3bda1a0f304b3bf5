"""Anthropic's request schema, and a request as a conversation.

Fields in `SKIPPED`, which clients send and which change nothing here, are ignored. Other unsupported fields are refused by
name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from bessemer.assistant.tools import Tool, ToolChoice
from bessemer.inference.sampling.params import SamplingParams
from bessemer.serving.config import MESSAGES, TOOLS
from bessemer.serving.openai.protocol import Stops
from bessemer.serving.openai.tools import ToolName, checked_tools, in_json
from bessemer.serving.runtime.bodies import Body, Name, misfit
from bessemer.serving.runtime.pictures import ImageData, image_of_base64

#: Fields that are ignored in any object: marks of the prompt cache, which is automatic here, and fields about the client or
#: Anthropic's own servers.
SKIPPED = frozenset(
    {"cache_control", "citations", "context_management", "metadata", "service_tier", "container", "inference_geo"}
)
#: Claude Code's system prompt has a line that differs in every request, and would defeat the prefix cache.
_BILLING = "x-anthropic-billing-header:"
#: Thinking budget in tokens by effort, for adaptive thinking; a higher effort has no limit.
_EFFORTS = {"low": 1024, "medium": 8192}


class AnthropicBody(Body):
    """A body, or an object in one."""

    @model_validator(mode="before")
    @classmethod
    def _without_skipped(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in SKIPPED or name in cls.model_fields}


class TextBlock(AnthropicBody):
    """A text."""

    type: Literal["text"]
    text: str


class ImageSource(AnthropicBody):
    """A picture's data. Addresses and files of an account are refused by their types."""

    type: Literal["base64"]
    media_type: Literal["image/png", "image/jpeg", "image/webp", "image/gif"]
    data: Annotated[ImageData, BeforeValidator(image_of_base64), WithJsonSchema({"type": "string"})]

    @field_validator("type", mode="before")
    @classmethod
    def _is_sent(cls, given: Any) -> Any:
        if given in ("url", "file"):
            raise ValueError(f"a picture is sent as base64; this server fetches no {given}")
        return given


class ImageBlock(AnthropicBody):
    """A picture."""

    type: Literal["image"]
    source: ImageSource


class ThinkingBlock(AnthropicBody):
    """What an earlier answer thought, or that it did: the signature is not read."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""
    signature: str = ""
    data: str = ""


class ToolUseBlock(AnthropicBody):
    """A call that an earlier answer made."""

    type: Literal["tool_use"]
    id: str
    name: ToolName
    input: dict[str, Any]


class ToolResultBlock(AnthropicBody):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool = False


Block = Annotated[TextBlock | ImageBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class AnthropicMessage(AnthropicBody):
    """One message of a conversation. A coding agent's may be the system's, in the middle of it."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    def in_chat(self) -> Iterator[dict[str, Any]]:
        """In the form of chat completions, where each result of a call is a message of its own."""
        blocks = [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        texts, thinking, calls = [], [], []
        parts: list[dict[str, Any]] = []
        for block in blocks:
            match block:
                case TextBlock():
                    texts.append(block.text)
                    is_next = bool(parts) and parts[-1]["type"] == "text"
                    parts.append({"type": "text", "text": f"\n\n{block.text}" if is_next else block.text})
                case ImageBlock():
                    parts.append({"type": "image", "image": block.source.data})
                case ThinkingBlock():
                    thinking.append(block.thinking)
                case ToolUseBlock():
                    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                    calls.append({"id": block.id, "type": "function", "function": function})
                case ToolResultBlock():
                    yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _joined(block.content)}
        has_images = any(part["type"] == "image" for part in parts)
        message: dict[str, Any] = {"role": self.role, "content": parts if has_images else "\n\n".join(texts)}
        if any(thinking):
            message["reasoning_content"] = "".join(thinking)
        if calls:
            message["tool_calls"] = calls
        if parts or calls or not blocks:
            yield message


class ToolBody(AnthropicBody):
    """A tool. One whose type Anthropic's servers run themselves is skipped."""

    meaningful: ClassVar[frozenset[str]] = frozenset({"type"})

    type: Literal["custom"] = "custom"
    name: ToolName
    description: str = ""
    input_schema: Annotated[dict[str, Any], AfterValidator(in_json)]
    strict: bool = False
    eager_input_streaming: bool = False
    defer_loading: bool = False


class ChoiceBody(AnthropicBody):
    """Which tools may be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _names_a_tool(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise misfit("tool_choice", "tool_choice: type tool and a name go together")
        return self


class ThinkingBody(AnthropicBody):
    """Whether the model is to think, and how much."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(AnthropicBody):
    """How much effort an answer is worth."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class CountRequest(AnthropicBody):
    """The body of `/v1/messages/count_tokens`, and what that of `/v1/messages` has of it."""

    model: Name
    messages: list[AnthropicMessage] = Field(max_length=MESSAGES.most)
    system: str | list[TextBlock] = ""
    tools: list[ToolBody] = Field(default_factory=list, max_length=TOOLS.most)
    tool_choice: ChoiceBody | None = None
    thinking: ThinkingBody | None = None
    output_config: OutputConfig | None = None

    meaningful: ClassVar[frozenset[str]] = frozenset({"tool_choice", "tools"})

    @model_validator(mode="before")
    @classmethod
    def _without_tools_of_others(cls, values: Any) -> Any:
        """Tools that Anthropic's servers run, by their types (`web_search_20250305`), need no answer of ours."""
        if not isinstance(values, dict) or not isinstance(values.get("tools"), list):
            return values
        own = [tool for tool in values["tools"] if not isinstance(tool, dict) or tool.get("type") in (None, "custom")]
        return {**values, "tools": own}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.tool_choice is not None and self.tool_choice.name not in (None, *(tool.name for tool in self.tools)):
            raise misfit("tool_choice.name", f"tool_choice names '{self.tool_choice.name}', which is not among the tools")
        return self

    def in_chat(self) -> list[dict[str, Any]]:
        """The conversation in the form of chat completions."""
        system = _joined(self.system)
        lines = [line for line in system.split("\n") if not line.strip().lower().startswith(_BILLING)]
        system = "\n".join(lines).strip("\n") if len(lines) < system.count("\n") + 1 else system
        first = [{"role": "system", "content": system}] if system else []
        return [*first, *(chat_message for message in self.messages for chat_message in message.in_chat())]

    def offered(self) -> list[Tool]:
        """The tools that may be called. Raises ApiError for an invalid schema and for two tools of one name."""
        if self.tool_choice is not None and self.tool_choice.type == "none":
            return []
        return checked_tools((tool.name, tool.description, tool.input_schema, tool.strict) for tool in self.tools)

    @property
    def choice(self) -> ToolChoice:
        """Which of the tools may or must be called."""
        choice = self.tool_choice
        if choice is None or not self.tools:
            return ToolChoice()
        return ToolChoice(choice.type in ("any", "tool"), choice.name, not choice.disable_parallel_tool_use)

    @property
    def budget(self) -> int | None:
        """Most tokens of thinking; None: no limit."""
        if self.thinking is None:
            return None
        if self.thinking.type == "disabled":
            return 0
        if self.thinking.budget_tokens is not None:
            return self.thinking.budget_tokens
        return _EFFORTS.get((self.output_config.effort if self.output_config is not None else None) or "")


class MessagesRequest(CountRequest):
    """The body of `/v1/messages`."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Stops = Field(default_factory=list)
    stream: bool = False
    temperature: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The engine's settings for this request."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop=self.stop_sequences,
        )


def _joined(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n\n".join(block.text for block in content)
