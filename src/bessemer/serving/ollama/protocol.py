"""Ollama's request schema, and a request as a conversation.

Options that choose hardware or memory (`WITHOUT_EFFECT`) are ignored: the server's own settings decide. Other unsupported
options are refused by name.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from bessemer.inference.sampling.params import SamplingParams
from bessemer.serving.config import EMBEDDED, LIKELIEST, MESSAGES, TOOLS
from bessemer.serving.openai.protocol import Stops
from bessemer.serving.openai.tools import FunctionTool, ToolName, in_json
from bessemer.serving.runtime.bodies import ApiError, Body, Name

#: Options that are ignored. The server's settings decide the context, and a repetition penalty counts all tokens, whatever
#: `repeat_last_n` says.
WITHOUT_EFFECT = frozenset(
    {"numa", "num_ctx", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mmap"}
    | {"use_mlock", "embedding_only", "num_thread", "num_keep", "repeat_last_n", "penalize_newline", "mirostat_tau"}
    | {"mirostat_eta", "draft_num_predict"}
)
#: Ollama's defaults, where they differ from the engine's. A model's own sampling settings override them.
DEFAULTS: Mapping[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
#: Ollama's names of sampling settings, where they differ from the engine's.
_NAMES = {"repeat_penalty": "repetition_penalty"}
#: Thinking budget in tokens by level of `think`; without a limit for others.
_BUDGETS = {False: 0, "low": 1024, "medium": 8192}
#: The tag that Ollama gives a model's name without one.
_TAG = ":latest"


def _plain_name(name: Any) -> Any:
    return name.removesuffix(_TAG) if isinstance(name, str) else name


def _without_options_of_hardware(options: Any) -> Any:
    if not isinstance(options, dict):
        return options
    return {name: value for name, value in options.items() if name not in WITHOUT_EFFECT}


def _stop_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


ModelName = Annotated[Name, BeforeValidator(_plain_name)]
#: "json" is any object; "" is any text.
Format = Literal["", "json"] | Annotated[dict[str, Any], AfterValidator(in_json)] | None
KeepAlive = Annotated[float, Field(allow_inf_nan=False)] | str | None


class Options(Body):
    """Sampling options. num_predict: the most tokens; -1 and -2: as many as the context holds."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repeat_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = None
    num_predict: int | None = Field(None, ge=-2)
    stop: Annotated[Stops, BeforeValidator(_stop_list)] = Field(default_factory=list)
    mirostat: Literal[0] = 0
    tfs_z: Annotated[float, Field(ge=1, le=1)] = 1.0

    @property
    def token_limit(self) -> int | None:
        """The most tokens of the answer; None: as many as the context holds."""
        return None if self.num_predict is None or self.num_predict < 0 else self.num_predict

    def sampling(self, own: Mapping[str, Any], max_tokens: int, **settings: Any) -> SamplingParams:
        """The engine's settings. own: the model's, which override Ollama's defaults; settings: those that are not in the
        options."""
        given = {
            _NAMES.get(name, name): value
            for name in Options.model_fields.keys() - {"num_predict", "mirostat", "tfs_z"}
            if (value := getattr(self, name)) is not None
        }
        if given.get("seed", 0) < 0:
            # in Ollama -1 means a new random seed each time
            del given["seed"]
        return SamplingParams(max_tokens=max_tokens, **{**DEFAULTS, **own, **given, **settings})


class OllamaBody(Body):
    """What all bodies share."""

    model: ModelName = Field(min_length=1)
    options: Annotated[Options, BeforeValidator(_without_options_of_hardware)] = Field(
        default_factory=lambda: Options.model_validate({})
    )
    #: Accepted without effect: `serve --idle-minutes` closes additional models.
    keep_alive: KeepAlive = None


class GenerationBody(OllamaBody):
    """What both bodies of completions share."""

    stream: bool = True
    format: Format = None
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=LIKELIEST.most)

    @property
    def thinking_budget(self) -> int | None:
        """Most tokens of thinking; None: no limit."""
        return None if self.think is None else _BUDGETS.get(self.think)

    def sampling(self, own: Mapping[str, Any], max_tokens: int) -> SamplingParams:
        """The engine's settings; own: the model's."""
        settings: dict[str, Any] = {"logprobs": self.top_logprobs} if self.logprobs else {}
        if self.format:
            settings["json_schema"] = {"type": "object"} if self.format == "json" else self.format
        return self.options.sampling(own, max_tokens, **settings)

    def parameter_in(self, reason: str) -> str | None:
        """The request's parameter that an engine's error is about, which begins with the engine's name of it."""
        name = reason.partition(" ")[0].partition(":")[0]
        if name == "json_schema":
            return "format"
        named = {engine: ours for ours, engine in _NAMES.items()}.get(name, name)
        return f"options.{named}" if named in Options.model_fields else None


class CalledFunction(Body):
    """A function and its arguments."""

    name: ToolName
    arguments: dict[str, Any] = Field(default_factory=dict)
    index: int | None = None
    description: str | None = None


class Call(Body):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of a conversation. tool_name: of a result, the tool that gave it."""

    #: Images come with the models that see them.
    meaningful: ClassVar[frozenset[str]] = frozenset()

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str = ""
    images: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list)
    tool_calls: list[Call] = Field(default_factory=list, max_length=TOOLS.most)
    tool_name: str | None = None
    tool_call_id: str | None = None


class ChatBody(GenerationBody):
    """The body of `/api/chat`. Without messages the model is loaded."""

    messages: list[Message] = Field(default_factory=list, max_length=MESSAGES.most)
    tools: list[FunctionTool] = Field(default_factory=list, max_length=TOOLS.most)

    def in_chat(self) -> list[dict[str, Any]]:
        """The messages in the form of chat completions. Raises ApiError for a result of no call."""
        return in_chat(self.messages)


class GenerateBody(GenerationBody):
    """The body of `/api/generate`. raw: the prompt is not put into the chat template. Without a prompt the model is loaded."""

    prompt: str = ""
    suffix: str = ""
    system: str = ""
    raw: bool = False
    #: Only empty values are supported: the chat template is the model's, and `/api/chat` takes conversations.
    template: Literal[""] = ""
    context: Annotated[list[int], Field(max_length=0)] = Field(default_factory=list)
    images: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list)

    def in_chat(self) -> list[dict[str, Any]]:
        """The prompt as a conversation."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


class EmbedBody(OllamaBody):
    """The body of `/api/embed`, and of the older `/api/embeddings`, whose text is `prompt`.

    truncate: whether a text that is longer than the context is cut; otherwise it is refused.
    """

    input: Annotated[list[str], BeforeValidator(_stop_list)] = Field(default_factory=list, max_length=EMBEDDED.most)
    prompt: str = ""
    truncate: bool = True
    dimensions: int | None = Field(None, ge=1)


class ShowBody(Body):
    """The body of `/api/show`. name: the older name of `model`."""

    model: ModelName = ""
    name: ModelName = ""
    verbose: bool = False


def in_chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the form of chat completions, where calls have ids and a result names its call.

    Ollama's calls have no ids: a result answers the first unanswered call of its `tool_name`, or of any tool where it names
    none. Raises ApiError for a result without a call.
    """
    given: list[dict[str, Any]] = []
    open_calls: dict[str, deque[str]] = defaultdict(deque)
    for place, message in enumerate(messages):
        shown: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thinking:
            shown["reasoning_content"] = message.thinking
        if message.tool_calls:
            shown["tool_calls"] = []
            for index, call in enumerate(message.tool_calls):
                identity = call.id or f"call_{place}_{index}"
                arguments = json.dumps(call.function.arguments, ensure_ascii=False)
                function = {"name": call.function.name, "arguments": arguments}
                shown["tool_calls"].append({"id": identity, "type": "function", "function": function})
                open_calls[call.function.name].append(identity)
        if message.role == "tool":
            shown["tool_call_id"] = _answered(message, place, open_calls)
        given.append(shown)
    return given


def _answered(message: Message, place: int, open_calls: Mapping[str, deque[str]]) -> str:
    """The id of the call that a result answers; removes it from the open calls."""
    for name, identities in open_calls.items():
        if message.tool_call_id is None:
            if identities and message.tool_name in (None, name):
                return identities.popleft()
        elif message.tool_call_id in identities:
            identities.remove(message.tool_call_id)
            return message.tool_call_id
    reason = f"messages[{place}] is the result of no call before it; say which tool by tool_name"
    raise ApiError(reason, parameter="messages", code="invalid_value")
