"""OpenAI's request schema with vLLM's extensions, under vLLM's names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, create_model, model_validator

from bessemer.core.errors import RequestError
from bessemer.inference.sampling.grammar import check_size
from bessemer.inference.sampling.params import GRAMMARS, Mark, SamplingParams
from bessemer.serving.config import (
    ANSWERS,
    CHOICES,
    LIKELIEST,
    MESSAGES,
    STOP_CHARACTERS,
    STOP_TOKENS,
    STOPS,
    TOKEN_RULES,
    TOOLS,
)
from bessemer.serving.openai.tools import (
    Choice,
    FunctionTool,
    GrammarSetting,
    NamedTool,
    ResponseFormat,
    StructuredOutputs,
    ToolName,
)
from bessemer.serving.retrieval.protocol import RetrievalRequest
from bessemer.serving.runtime.bodies import ApiError, Body, Name, misfit
from bessemer.serving.runtime.pictures import ImageData, image_of_uri, text_of

#: Tokens of a plain completion when the client sets no limit, as OpenAI documents it.
_COMPLETION_TOKENS = 16


def _content(content: Any) -> Any:
    """A message's content as one string; with pictures, a list of texts and pictures in their order."""
    if not isinstance(content, list):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image_url":
            parts.append({"type": "image", "image": _image(part.get("image_url"))})
        else:
            raise ValueError(f"only texts and pictures (image_url) are served, got {kind!r}")
    return parts if any(part["type"] == "image" for part in parts) else text_of(parts)


def _image(given: Any) -> ImageData:
    """A picture of `image_url`. Its `detail` changes nothing: a model takes pictures in one way."""
    if isinstance(given, dict) and (unknown := given.keys() - {"url", "detail"}):
        raise ValueError(f"image_url has no {min(unknown)!r}")
    return image_of_uri(given.get("url") if isinstance(given, dict) else given)


def prompts_of(prompt: Any) -> Any:
    """A list of prompts from what clients send: a text, token ids, or a list of either."""
    given = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
    if len(given) > ANSWERS.most:
        raise ValueError(f"it has {len(given):,} prompts, at most {ANSWERS.most:,} are taken")
    if not all(isinstance(each, str) for each in given) and not all(map(_is_token_ids, given)):
        raise ValueError("give a text, a list of texts, a list of token ids, or a list of such lists")
    if empty := [place for place, each in enumerate(given) if each == []]:
        raise ValueError(f"it needs at least one token id (prompt {empty[0]} has none)")
    return given


def _is_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)


def _stop_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _within_characters(stops: list[str]) -> list[str]:
    """Limit the work at each token: every character of a stop string may be compared."""
    if (characters := sum(map(len, stops))) > STOP_CHARACTERS.most:
        raise ValueError(f"its texts have {characters:,} characters, at most {STOP_CHARACTERS.most:,} are looked for")
    return stops


#: Stop strings.
Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=STOPS.most), AfterValidator(_within_characters)]


def _by_token(bias: Any) -> Any:
    """Biases by token id; JSON has the ids as strings."""
    if not isinstance(bias, dict):
        return bias
    if len(bias) > TOKEN_RULES.most:
        raise ValueError(f"it has {len(bias):,} token ids, at most {TOKEN_RULES.most:,} are taken")
    if wrong := next((key for key in bias if not (isinstance(key, str) and key.isascii() and key.isdigit())), None):
        raise ValueError(f"its keys are token ids, got {wrong[:100]!r}")
    # of many wrong ones, pydantic sees one: it would make an error for each
    biases = {int(key): value for key, value in bias.items()}
    wrong_id = next((id for id, value in biases.items() if type(value) not in (int, float) or not -100 <= value <= 100), None)
    return biases if wrong_id is None else {wrong_id: biases[wrong_id]}


class CalledFunction(Body):
    """A function and its arguments, which are a text of JSON."""

    name: ToolName
    arguments: str


class Call(Body):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of a conversation."""

    role: str = Field(pattern="^(system|developer|user|assistant|tool)$")
    content: Annotated[str | list[dict[str, Any]], BeforeValidator(_content)] = ""
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] = Field(default_factory=list, max_length=TOOLS.most)
    tool_call_id: str | None = None
    # what an earlier answer cited: its text holds the numbers
    annotations: list[dict[str, Any]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        of_role = {"assistant": ("tool_calls", "reasoning", "reasoning_content"), "tool": ("tool_call_id",)}
        for role, names in of_role.items():
            if role != self.role and (name := next((name for name in names if getattr(self, name)), None)):
                raise misfit(name, f"{name} is of a message of role '{role}', and this is of role '{self.role}'")
        if self.role == "tool" and self.tool_call_id is None:
            raise misfit("tool_call_id", "a message of role 'tool' answers a call; say which by tool_call_id")
        if not (self.tool_calls or "content" in self.model_fields_set):
            raise misfit("content", f"a message of role '{self.role}' needs content")
        if self.role != "user" and isinstance(self.content, list):
            raise misfit("content", f"pictures are of a message of role 'user', and this is of role '{self.role}'")
        return self

    def as_template_input(self) -> dict[str, Any]:
        """The message for a chat template, which knows the role `developer` by its older name `system`."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if reasoning := self.reasoning or self.reasoning_content:
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        message |= {name: value for name in ("tool_call_id", "name") if (value := getattr(self, name)) is not None}
        return message


class TemplateSettings(Body):
    """What a client may tell the chat template."""

    enable_thinking: bool | None = None


#: Thinking budget in tokens by `reasoning_effort`; a higher effort has no limit.
EFFORTS = {"none": 0, "minimal": 512, "low": 1024, "medium": 8192}


class StreamOptions(Body):
    """What a stream carries besides the text."""

    include_usage: bool = False


if TYPE_CHECKING:
    _ServedSettings = Body
else:
    _ServedSettings = create_model(
        "_ServedSettings",
        __base__=Body,
        **{
            name: (Annotated[(field.annotation, *field.metadata)], field.default)
            for name, field in SamplingParams.model_fields.items()
            if Mark.SERVED in field.metadata
        },
    )


class GenerationRequest(_ServedSettings):
    """What both endpoints take: the engine's settings that carry `Mark.SERVED`, and those below.

    The fields in `_SHARED` mean what they mean in `SamplingParams`.
    """

    model: Name
    n: int = Field(1, ge=1, le=CHOICES.most)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_by_token)] = Field(
        default_factory=dict
    )
    allowed_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1, max_length=TOKEN_RULES.most)
    seed: int | None = None
    stop: Annotated[Stops, BeforeValidator(_stop_list)] = Field(default_factory=list)
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list, max_length=STOP_TOKENS.most)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    guided_grammar: str | None = None
    cache_salt: str | None = Field(None, min_length=1)
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options and not self.stream:
            raise misfit("stream_options", "stream_options needs stream: true")
        return self

    @model_validator(mode="after")
    def _one_grammar(self) -> Self:
        if len(grammars := self._grammars()) > 1:
            first, second, *_ = (grammar.parameter for grammar in grammars)
            raise misfit(second, f"{first} and {second} both say what the text must look like; send one of them")
        for grammar in grammars:
            try:
                check_size(grammar.setting, grammar.value, grammar.parameter)
            except RequestError as error:
                raise misfit(grammar.parameter, str(error)) from None
        return self

    def _grammars(self) -> list[GrammarSetting]:
        """The constraints on the text, from all parameters that may give one."""
        grammars = [
            None if self.response_format is None else self.response_format.grammar(),
            None if self.structured_outputs is None else self.structured_outputs.grammar(),
            GrammarSetting("guided_json", "json_schema", self.guided_json),
            GrammarSetting("guided_regex", "regex", self.guided_regex),
            GrammarSetting("guided_choice", "choice", self.guided_choice),
            GrammarSetting("guided_grammar", "ebnf", self.guided_grammar),
        ]
        return [grammar for grammar in grammars if grammar is not None and grammar.value is not None]

    @property
    def token_limit(self) -> int | None:
        """The client's limit on generated tokens; None: the context is the limit."""
        return self.max_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def answers(self) -> int:
        """Number of answers to a prompt."""
        return self.n

    @property
    def wants_log_probs(self) -> bool:
        return False

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The engine's settings for this request. Raises ApiError (400) where the limit is too low for `min_tokens`."""
        if self.min_tokens > max_tokens:
            raise ApiError(
                f"min_tokens ({self.min_tokens}) is above the most tokens that may come ({max_tokens}); lower it",
                parameter="min_tokens",
                code="invalid_value",
            )
        settings = {name: getattr(self, name) for name in _SHARED} | self._own_settings()
        settings |= {grammar.setting: grammar.value for grammar in self._grammars()}
        return SamplingParams(max_tokens=max_tokens, allowed_tokens=self.allowed_token_ids, **settings)

    def parameter_in(self, reason: str) -> str | None:
        """The request's parameter that an error of the engine is about: its text begins with the name."""
        name = re.split(r"\W", reason, maxsplit=1)[0]
        if name in GRAMMARS:
            return next((grammar.parameter for grammar in self._grammars()), None)
        name = _OWN_NAMES.get(name, name)
        return name if name in type(self).model_fields else None

    def _own_settings(self) -> dict[str, Any]:
        """Settings that one endpoint alone has, or calls by another name."""
        return {}


#: The engine's names of parameters that clients call otherwise.
_OWN_NAMES = {"allowed_tokens": "allowed_token_ids"}
#: Parameters with the same name in the engine.
_SHARED = tuple(GenerationRequest.model_fields.keys() & SamplingParams.model_fields.keys() - {"max_tokens"})


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    meaningful = frozenset({"tool_choice", "parallel_tool_calls"})

    messages: list[Message] = Field(min_length=1, max_length=MESSAGES.most)
    tools: list[FunctionTool] = Field(default_factory=list, max_length=TOOLS.most)
    tool_choice: Choice = "auto"
    parallel_tool_calls: bool = True
    thinking_budget: int | None = Field(None, ge=0)
    thinking_token_budget: int | None = Field(None, ge=0)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool = True
    chat_template_kwargs: TemplateSettings | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=LIKELIEST.most)
    continue_final_message: bool | None = None
    add_generation_prompt: bool = True
    retrieval: RetrievalRequest | None = None

    @model_validator(mode="after")
    def _continues(self) -> Self:
        may_be_continued = self.messages[-1].role == "assistant" and not self.messages[-1].tool_calls
        if self.continue_final_message and not may_be_continued:
            raise misfit("continue_final_message", "the last message is not the assistant's; leave continue_final_message out")
        if not self.add_generation_prompt and (not may_be_continued or self.continue_final_message is False):
            raise misfit("add_generation_prompt", "add_generation_prompt: false leaves the assistant nothing to go on with")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise misfit("max_completion_tokens", "max_tokens and max_completion_tokens differ; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise misfit("top_logprobs", "top_logprobs needs logprobs: true")
        if not self.tools and self.tool_choice not in ("none", "auto"):
            raise misfit("tool_choice", "tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in [tool.function.name for tool in self.tools]:
                raise misfit("tool_choice", f"tool_choice names '{name}', which is not among the tools")
        if len(set(self._budgets())) > 1:
            raise misfit("thinking_budget", "thinking_budget is said twice, and not alike; say it once")
        return self

    @property
    def last_question(self) -> str:
        """The user's last message; "" where there is none."""
        return next((text_of(message.content) for message in reversed(self.messages) if message.role == "user"), "")

    def _budgets(self) -> list[int]:
        """The thinking budgets, from all parameters that may give one."""
        off = self.chat_template_kwargs is not None and self.chat_template_kwargs.enable_thinking is False
        budgets = (
            self.thinking_budget,
            self.thinking_token_budget,
            EFFORTS.get(self.reasoning_effort or ""),
            0 if off else None,
        )
        return [budget for budget in budgets if budget is not None]

    @property
    def budget(self) -> int | None:
        """Most tokens of thinking; None: no limit."""
        return next(iter(self._budgets()), None)

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_log_probs(self) -> bool:
        return self.logprobs

    def _own_settings(self) -> dict[str, Any]:
        return {"logprobs": self.top_logprobs if self.logprobs else None}


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(prompts_of)]
    max_tokens: int | None = Field(None, ge=0)
    best_of: int | None = Field(None, ge=1, le=CHOICES.most)
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=LIKELIEST.most)
    logprobs_mode: Literal["raw", "temperature", "sampled"] = "raw"
    return_weight_versions: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.return_weight_versions and (self.stream or self.best_of is not None):
            name = "stream" if self.stream else "best_of"
            raise misfit("return_weight_versions", f"return_weight_versions: of whole answers as they were sampled; no {name}")
        if self.best_of is not None and self.best_of < self.n:
            raise misfit("best_of", f"best_of ({self.best_of}) is below n ({self.n}); raise it or leave it out")
        if self.stream and self.answers > self.n:
            raise misfit("best_of", "the best of several answers is known at their end; leave out best_of, or stream")
        if self.suffix is not None and self.echo:
            raise misfit("suffix", "suffix asks for what stands between two texts, which echo cannot show; send one of them")
        if self.suffix is not None and not all(isinstance(prompt, str) for prompt in self.prompt):
            raise misfit("suffix", "suffix goes with prompts that are texts; of token ids, put the control tokens in yourself")
        if self.max_tokens == 0 and not self.echo:
            raise misfit("max_tokens", "max_tokens: 0 generates nothing; send echo: true to get the prompt back, or at least 1")
        if self.max_tokens == 0 and self.best_of is not None:
            raise misfit("best_of", "best_of ranks answers, and max_tokens: 0 makes none; leave one of them out")
        if (answers := len(self.prompt) * self.answers) > ANSWERS.most:
            most = ANSWERS.most
            raise misfit("prompt", f"prompt asks for {answers:,} answers, at most {most:,} are made to one request")
        return self

    @property
    def token_limit(self) -> int | None:
        return _COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def answers(self) -> int:
        return self.best_of or self.n

    @property
    def wants_log_probs(self) -> bool:
        return self.logprobs is not None

    def _own_settings(self) -> dict[str, Any]:
        return {
            "best_of": self.best_of,
            "logprobs": self.logprobs,
            "logprobs_mode": self.logprobs_mode,
            "prompt_logprobs": self.logprobs if self.echo else None,
        }
