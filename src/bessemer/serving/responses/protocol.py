"""`/v1/responses`: the request schema, and a request as a conversation.

Fields in `SKIPPED`, which clients send and which change nothing here, are ignored. Other unsupported fields are refused by
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from bessemer.assistant.tools import Tool, ToolChoice
from bessemer.inference.sampling.params import SamplingParams
from bessemer.serving.config import MESSAGES, TOOLS
from bessemer.serving.openai.protocol import EFFORTS
from bessemer.serving.openai.tools import GrammarSetting, JsonSchema, ResponseFormat, ToolName, checked_tools, in_json
from bessemer.serving.responses.items import InputMessage, Item, messages_of
from bessemer.serving.retrieval.protocol import FileSearchTool
from bessemer.serving.runtime.bodies import ApiError, Body, Metadata, Name, misfit

#: Ignored fields of a request: about the client, additional output, and OpenAI's own servers.
SKIPPED = frozenset(
    {
        *("client_metadata", "prompt_cache_retention", "service_tier", "user", "stream_options", "context_management"),
    }
)
#: Types of tools that are ignored: OpenAI's servers run them, or clients offer them to other models.
_OTHER_TOOLS = frozenset(
    {
        *("apply_patch", "code_interpreter", "computer_use_preview", "custom", "image_generation"),
        *("local_shell", "mcp", "namespace", "shell", "tool_search", "web_search", "web_search_preview"),
    }
)


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


class ConversationRequest(Body):
    """A conversation: what is added to an earlier one, or all of it."""

    meaningful: ClassVar[frozenset[str]] = frozenset({"prompt_cache_key"})

    model: Name
    input: str | Annotated[list[Item], Field(max_length=MESSAGES.most)] = Field(default_factory=list)
    instructions: str = ""
    previous_response_id: Name | None = None
    prompt_cache_key: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_skipped(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {name: value for name, value in values.items() if name not in SKIPPED}
        if isinstance(tools := values.get("tools"), list):
            values["tools"] = [tool for tool in tools if not (isinstance(tool, dict) and tool.get("type") in _OTHER_TOOLS)]
        return values

    @property
    def items(self) -> Sequence[Item]:
        """The input as items."""
        if isinstance(self.input, str):
            return [InputMessage.model_validate({"role": "user", "content": self.input})]
        return self.input

    def in_chat(self, previous: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation in the form of chat completions. previous: messages of the response that this one follows. Raises
        ApiError for the result of a call that nobody made."""
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages = [*first, *previous, *messages_of(self.items)]
        made: set[str] = set()
        for message in messages:
            made.update(call["id"] for call in message.get("tool_calls", ()))
            if message["role"] == "tool" and message["tool_call_id"] not in made:
                raise ApiError(
                    f"no call has the id '{message['tool_call_id']}' of a function_call_output",
                    parameter="input",
                    code="invalid_value",
                )
        return messages


class ResponsesRequest(ConversationRequest):
    """The body of `/v1/responses`."""

    meaningful: ClassVar[frozenset[str]] = frozenset(
        {"tools", "tool_choice", "parallel_tool_calls", "store", "metadata", "prompt_cache_key", "safety_identifier"}
    )

    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
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
    safety_identifier: Name | None = None

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
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            **form,
        )


class SocketRequest(ResponsesRequest):
    """A message of a WebSocket. generate: False where the model is only to be made ready for what follows."""

    type: Literal["response.create"]
    generate: bool = True


class CompactRequest(ConversationRequest):
    """The body of `/v1/responses/compact`."""
