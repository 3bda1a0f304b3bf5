"""Data of `/v1/responses`: the request schema, the conversation that a request means, and the responses that are kept.

Fields that OpenAI's clients and agents send and that change nothing here are skipped: `SKIPPED`. Others that are not served are
refused by name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from bessemer.assistant.tools import Tool, ToolChoice
from bessemer.inference.sampling.params import SamplingParams
from bessemer.serving import config as limits
from bessemer.serving.openai.protocol import EFFORTS
from bessemer.serving.openai.tools import (
    Function,
    FunctionTool,
    Grammar,
    JsonSchema,
    ResponseFormat,
    ToolName,
    in_json,
    tools_of,
)
from bessemer.serving.runtime.bodies import Body, Name, misfit

_MIB = 2**20
#: Bytes that a value takes besides its text.
_VALUE_BYTES = 64


@dataclass(frozen=True)
class StoredResponse:
    """A response with its conversation, in the form of chat completions and without instructions. owner: the client's id."""

    owner: str
    body: dict[str, Any]
    messages: list[dict[str, Any]]
    inputs: list[dict[str, Any]]


class ResponseStore(Protocol):
    """Where responses are kept; several servers may share one."""

    async def keep(self, identity: str, response: StoredResponse) -> None:
        """Keep a response."""

    async def find(self, identity: str) -> StoredResponse | None:
        """A response; None where there is none, or no longer."""

    async def drop(self, identity: str) -> None:
        """Forget a response."""


@dataclass
class _Shelf:
    """What is stored of one owner, the oldest first, and how many bytes it has."""

    sizes: OrderedDict[str, int] = field(default_factory=OrderedDict)
    size: int = 0


class MemoryStore:
    """The last responses, in memory, limited in number and in MiB. Beyond a limit the oldest response of the owner with the
    most bytes is dropped, so that one owner's flood drops no other's."""

    def __init__(self, most: int = limits.STORED.most, most_mib: float = limits.STORED_BYTES.most) -> None:
        self._most = most
        self._most_bytes = round(most_mib * _MIB)
        self._stored: dict[str, StoredResponse] = {}
        self._shelves: dict[str, _Shelf] = {}
        self._size = 0

    async def keep(self, identity: str, response: StoredResponse) -> None:
        await self.drop(identity)
        size = size_of([response.body, response.messages, response.inputs])
        shelf = self._shelves.setdefault(response.owner, _Shelf())
        self._stored[identity] = response
        shelf.sizes[identity] = size
        shelf.size += size
        self._size += size
        while len(self._stored) > self._most or self._size > self._most_bytes:
            largest = max(self._shelves.values(), key=lambda one: one.size)
            await self.drop(next(iter(largest.sizes)))

    async def find(self, identity: str) -> StoredResponse | None:
        return self._stored.get(identity)

    async def drop(self, identity: str) -> None:
        if (response := self._stored.pop(identity, None)) is None:
            return
        shelf = self._shelves[response.owner]
        size = shelf.sizes.pop(identity)
        shelf.size -= size
        self._size -= size
        if not shelf.sizes:
            del self._shelves[response.owner]


def size_of(value: Any) -> int:
    """About how many bytes a value of JSON takes in memory."""
    size, left = 0, [value]
    while left:
        one = left.pop()
        size += _VALUE_BYTES
        if isinstance(one, str):
            size += len(one) if one.isascii() else 4 * len(one)
        elif isinstance(one, Mapping):
            left += [*one, *one.values()]
        elif isinstance(one, Sequence):
            left += one
    return size


#: Fields that are skipped where they stand at the top: what a client tells of itself, what it would like to be told besides,
#: and where OpenAI's servers may work.
SKIPPED = frozenset(
    {
        *("client_metadata", "include", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier"),
        *("user", "stream_options", "context_management"),
    }
)
#: The types of tools that need no answer of ours: OpenAI's servers run them, or the client offers them to other models.
_OTHER_TOOLS = frozenset(
    {
        *(
            "apply_patch",
            "code_interpreter",
            "computer_use_preview",
            "custom",
            "file_search",
            "image_generation",
            "local_shell",
        ),
        *("mcp", "namespace", "shell", "tool_search", "web_search", "web_search_preview"),
    }
)


class TextPart(Body):
    """A text of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] = Field(default_factory=list)


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


class InputMessage(Body):
    """A message of the conversation. id, status: of one that an earlier response made."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]
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
    output: str | list[TextPart]
    id: str | None = None
    status: str | None = None


Item = InputMessage | ReasoningItem | CallItem | CallOutput


class FlatTool(Body):
    """A function that the client runs."""

    type: Literal["function"]
    name: ToolName
    description: str = ""
    parameters: Annotated[dict[str, Any], AfterValidator(in_json)] = Field(
        default_factory=lambda: {"type": "object", "properties": {}}
    )
    strict: bool = False
    defer_loading: bool = False

    def in_chat(self) -> FunctionTool:
        """In the form of chat completions."""
        function = Function(name=self.name, description=self.description, parameters=self.parameters, strict=self.strict)
        return FunctionTool(type="function", function=function)


class NamedChoice(Body):
    """The one function that is to be called."""

    type: Literal["function"]
    name: ToolName


class TextFormat(Body):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    description: str | None = None
    definition: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def grammar(self) -> Grammar | None:
        """The grammar that it asks for."""
        if self.type == "text":
            return None
        schema = None if self.definition is None else JsonSchema(name=self.name or "schema", schema=self.definition)
        return ResponseFormat(type=self.type, json_schema=schema).grammar()


class TextSettings(Body):
    """What the text is like. verbosity is the model's to choose."""

    format: TextFormat = Field(default_factory=lambda: TextFormat.model_validate({}))
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    """How much the model is to think. A summary is not made: the thinking itself is told."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


def _few_pairs(metadata: Any) -> Any:
    if isinstance(metadata, dict) and len(metadata) > limits.METADATA.most:
        raise ValueError(f"it has {len(metadata):,} pairs, at most {limits.METADATA.most} are kept")
    return metadata


class ResponsesRequest(Body):
    """The body of `/v1/responses`."""

    meaningful: ClassVar[frozenset[str]] = frozenset({"tools", "tool_choice", "parallel_tool_calls", "store", "metadata"})

    model: Name
    input: str | Annotated[list[Item], Field(max_length=limits.MESSAGES.most)] = Field(default_factory=list)
    instructions: str = ""
    previous_response_id: Name | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    tools: list[FlatTool] = Field(default_factory=list, max_length=limits.TOOLS.most)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextSettings = TextSettings()
    reasoning: Reasoning = Reasoning()
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    store: bool = True
    stream: bool = False
    metadata: Annotated[
        dict[
            Annotated[str, Field(max_length=limits.METADATA_KEY.most)],
            Annotated[str, Field(max_length=limits.METADATA_VALUE.most)],
        ],
        BeforeValidator(_few_pairs),
    ] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _without_skipped(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {name: value for name, value in values.items() if name not in SKIPPED}
        if isinstance(tools := values.get("tools"), list):
            values["tools"] = [tool for tool in tools if not (isinstance(tool, dict) and tool.get("type") in _OTHER_TOOLS)]
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [tool.name for tool in self.tools]
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.name not in names:
            raise misfit("tool_choice", f"tool_choice names '{self.tool_choice.name}', which is not among the tools")
        if self.tool_choice == "required" and not names:
            raise misfit("tool_choice", "tool_choice needs tools")
        return self

    @property
    def is_probe(self) -> bool:
        """Whether there is nothing to answer: agents ask so whether the server is there."""
        return not self.input and self.previous_response_id is None

    def in_chat(self, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation in the form of chat completions. before: of the response that this one follows."""
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return [*first, *before, *_messages(self.items)]

    @property
    def items(self) -> Sequence[Item]:
        """The input as items."""
        if isinstance(self.input, str):
            return [InputMessage.model_validate({"role": "user", "content": self.input})]
        return self.input

    def offered(self) -> list[Tool]:
        """The tools that may be called. Raises ApiError for a schema that is none and for two of a name."""
        return [] if self.tool_choice == "none" else tools_of([tool.in_chat() for tool in self.tools], inside="")

    @property
    def choice(self) -> ToolChoice:
        """Which of them."""
        if isinstance(self.tool_choice, NamedChoice):
            return ToolChoice(True, self.tool_choice.name, self.parallel_tool_calls)
        return ToolChoice(self.tool_choice == "required", None, self.parallel_tool_calls)

    @property
    def budget(self) -> int | None:
        """Most tokens of thinking; None: no limit."""
        return EFFORTS.get(self.reasoning.effort or "")

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The engine's settings for this request."""
        grammar = self.text.format.grammar()
        form = {} if grammar is None else {grammar.setting: grammar.value}
        return SamplingParams(max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p, **form)


def _messages(items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """Messages of chat completions: what the assistant thought, said and called in a row is one there."""
    said: dict[str, Any] | None = None
    for item in items:
        is_assistants = isinstance(item, ReasoningItem | CallItem) or (
            isinstance(item, InputMessage) and item.role == "assistant" and (said is None or not said["content"])
        )
        if not is_assistants:
            if said is not None:
                yield said
                said = None
            if isinstance(item, CallOutput):
                yield {"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)}
            elif isinstance(item, InputMessage) and item.role == "assistant":
                said = item.in_chat()
            elif isinstance(item, InputMessage):
                yield item.in_chat()
            continue
        said = said or {"role": "assistant", "content": ""}
        match item:
            case InputMessage():
                said["content"] = _joined(item.content)
            case ReasoningItem():
                said["reasoning_content"] = said.get("reasoning_content", "") + "".join(part.text for part in item.content)
            case CallItem():
                function = {"name": item.name, "arguments": item.arguments}
                said.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    if said is not None:
        yield said


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
