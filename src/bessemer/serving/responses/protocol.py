"""`/v1/responses`: the request schema, a request as a conversation, and stored responses.

Fields in `SKIPPED`, which clients send and which change nothing here, are ignored. Other unsupported fields are refused by
name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from bessemer.assistant.tools import Tool, ToolChoice
from bessemer.inference.sampling.params import SamplingParams
from bessemer.serving.config import MESSAGES, STORED, STORED_BYTES, TOOLS
from bessemer.serving.openai.protocol import EFFORTS
from bessemer.serving.openai.tools import GrammarSetting, JsonSchema, ResponseFormat, ToolName, checked_tools, in_json
from bessemer.serving.retrieval.protocol import FileSearchTool
from bessemer.serving.runtime.bodies import Body, Metadata, Name, misfit

_MIB = 2**20
#: Bytes of a Python object besides its text.
_VALUE_BYTES = 64


@dataclass(frozen=True)
class StoredResponse:
    """A response with its conversation.

    owner: the client's id. messages: in the form of chat completions, without instructions. inputs: items of the request.
    """

    owner: str
    body: dict[str, Any]
    messages: list[dict[str, Any]]
    inputs: list[dict[str, Any]]


class ResponseStore(Protocol):
    """Storage of responses; several servers may share one."""

    async def keep(self, identity: str, response: StoredResponse) -> None:
        """Store a response."""

    async def find(self, identity: str) -> StoredResponse | None:
        """A stored response; None for an unknown or dropped one."""

    async def drop(self, identity: str) -> None:
        """Delete a response."""


@dataclass
class _OwnerUsage:
    """Bytes of each stored response of one owner, the oldest first, and their sum."""

    sizes: OrderedDict[str, int] = field(default_factory=OrderedDict)
    size: int = 0


class MemoryStore:
    """The latest responses, in memory. Above a limit, the oldest response of the owner with the most bytes is dropped, so that
    one client cannot push out the others' responses."""

    def __init__(self, most: int = STORED.most, most_mib: float = STORED_BYTES.most) -> None:
        self._most = most
        self._most_bytes = round(most_mib * _MIB)
        self._stored: dict[str, StoredResponse] = {}
        self._by_owner: dict[str, _OwnerUsage] = {}
        self._size = 0

    async def keep(self, identity: str, response: StoredResponse) -> None:
        await self.drop(identity)
        size = size_of([response.body, response.messages, response.inputs])
        usage = self._by_owner.setdefault(response.owner, _OwnerUsage())
        self._stored[identity] = response
        usage.sizes[identity] = size
        usage.size += size
        self._size += size
        while len(self._stored) > self._most or self._size > self._most_bytes:
            largest = max(self._by_owner.values(), key=lambda usage: usage.size)
            await self.drop(next(iter(largest.sizes)))

    async def find(self, identity: str) -> StoredResponse | None:
        return self._stored.get(identity)

    async def drop(self, identity: str) -> None:
        if (response := self._stored.pop(identity, None)) is None:
            return
        usage = self._by_owner[response.owner]
        size = usage.sizes.pop(identity)
        usage.size -= size
        self._size -= size
        if not usage.sizes:
            del self._by_owner[response.owner]


def size_of(value: Any) -> int:
    """About how many bytes a value of JSON takes in memory."""
    size, left = 0, [value]
    while left:
        value = left.pop()
        size += _VALUE_BYTES
        if isinstance(value, str):
            size += len(value) if value.isascii() else 4 * len(value)
        elif isinstance(value, Mapping):
            left += [*value, *value.values()]
        elif isinstance(value, Sequence):
            left += value
    return size


#: Ignored fields of a request: about the client, additional output, and OpenAI's own servers.
SKIPPED = frozenset(
    {
        *("client_metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier"),
        *("user", "stream_options", "context_management"),
    }
)
#: Types of tools that are ignored: OpenAI's servers run them, or clients offer them to other models.
_OTHER_TOOLS = frozenset(
    {
        *("apply_patch", "code_interpreter", "computer_use_preview", "custom", "image_generation"),
        *("local_shell", "mcp", "namespace", "shell", "tool_search", "web_search", "web_search_preview"),
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


class FileSearchItem(Body):
    """A search that an earlier response made. The answer behind it holds what came of it."""

    type: Literal["file_search_call"]
    id: str | None = None
    queries: list[str] = Field(default_factory=list)
    results: list[Any] | None = None
    status: str | None = None


Item = InputMessage | ReasoningItem | CallItem | CallOutput | FileSearchItem


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


class NamedChoice(Body):
    """The one function that is to be called."""

    type: Literal["function"]
    name: ToolName


class FileSearchChoice(Body):
    """The search that is to be made, which is made in any case."""

    type: Literal["file_search"]


def _kind_of_tool(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "FileSearchTool" if kind == "file_search" else "FlatTool"


#: A tool of a request. Errors are those of its own kind.
ResponseTool = Annotated[
    Annotated[FlatTool, Tag("FlatTool")] | Annotated[FileSearchTool, Tag("FileSearchTool")], Discriminator(_kind_of_tool)
]


class TextFormat(Body):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    description: str | None = None
    definition: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def grammar(self) -> GrammarSetting | None:
        """The constraint on the text."""
        if self.type == "text":
            return None
        schema = None if self.definition is None else JsonSchema(name=self.name or "schema", schema=self.definition)
        return ResponseFormat(type=self.type, json_schema=schema).grammar()


class TextSettings(Body):
    """What the text is like. verbosity is the model's to choose."""

    format: TextFormat = Field(default_factory=lambda: TextFormat.model_validate({}))
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    """How much the model is to think. There is no summary: the thinking itself is returned."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(Body):
    """The body of `/v1/responses`."""

    meaningful: ClassVar[frozenset[str]] = frozenset({"tools", "tool_choice", "parallel_tool_calls", "store", "metadata"})

    model: Name
    input: str | Annotated[list[Item], Field(max_length=MESSAGES.most)] = Field(default_factory=list)
    instructions: str = ""
    previous_response_id: Name | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    tools: list[ResponseTool] = Field(default_factory=list, max_length=TOOLS.most)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | FileSearchChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextSettings = TextSettings()
    reasoning: Reasoning = Reasoning()
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    store: bool = True
    stream: bool = False
    metadata: Metadata = Field(default_factory=dict)
    include: list[str] = Field(default_factory=list, max_length=TOOLS.most)

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
        names = [tool.name for tool in self.functions]
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.name not in names:
            raise misfit("tool_choice", f"tool_choice names '{self.tool_choice.name}', which is not among the tools")
        if self.tool_choice == "required" and not self.tools:
            raise misfit("tool_choice", "tool_choice needs tools")
        if len(self.tools) - len(names) > 1:
            raise misfit("tools", "tools: name all vector stores in one file_search")
        if isinstance(self.tool_choice, FileSearchChoice) and self.file_search is None:
            raise misfit("tool_choice", "tool_choice names file_search, which is not among the tools")
        return self

    @property
    def functions(self) -> list[FlatTool]:
        """The tools that the client runs."""
        return [tool for tool in self.tools if isinstance(tool, FlatTool)]

    @property
    def file_search(self) -> FileSearchTool | None:
        """The search that this server makes; None where none is asked for."""
        if self.tool_choice == "none" or isinstance(self.tool_choice, NamedChoice):
            return None
        return next((tool for tool in self.tools if isinstance(tool, FileSearchTool)), None)

    @property
    def shows_results(self) -> bool:
        """Whether a search returns the passages that it found."""
        return "file_search_call.results" in self.include

    @property
    def is_probe(self) -> bool:
        """Whether there is no input: agents send such requests to see whether the server is there."""
        return not self.input and self.previous_response_id is None

    def in_chat(self, previous: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation in the form of chat completions. previous: messages of the response that this one follows."""
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return [*first, *previous, *_messages(self.items)]

    @property
    def items(self) -> Sequence[Item]:
        """The input as items."""
        if isinstance(self.input, str):
            return [InputMessage.model_validate({"role": "user", "content": self.input})]
        return self.input

    def offered(self) -> list[Tool]:
        """The tools that may be called. Raises ApiError for an invalid schema and for two tools of one name."""
        if self.tool_choice == "none" or isinstance(self.tool_choice, FileSearchChoice):
            return []
        return checked_tools((tool.name, tool.description, tool.parameters, tool.strict) for tool in self.functions)

    @property
    def choice(self) -> ToolChoice:
        """Which of the tools may or must be called."""
        if isinstance(self.tool_choice, NamedChoice):
            return ToolChoice(True, self.tool_choice.name, self.parallel_tool_calls)
        # a search is a call of a tool
        must_call = self.tool_choice == "required" and self.file_search is None
        return ToolChoice(must_call, None, self.parallel_tool_calls)

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
    """Messages of chat completions, where consecutive thinking, text and calls of the assistant are one message."""
    answer: dict[str, Any] | None = None
    for item in items:
        if isinstance(item, FileSearchItem):
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


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
