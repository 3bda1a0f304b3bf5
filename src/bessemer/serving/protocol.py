"""What clients may ask, in OpenAI's words, and how they are refused.

A parameter that would change the answer and is not served is refused by name, never ignored; the same parameter at
the value that changes nothing (`n: 1`, `frequency_penalty: 0`, `null` anywhere) is accepted, because clients send it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from bessemer.inference.sampling import SamplingParams

#: Parameters of OpenAI's API that are not served, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_obfuscation": (False,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1,),
    "top_logprobs": (0,),
    # of a message that an earlier answer is sent back as
    "annotations": ([],),
    "tool_calls": ([],),
}
#: Parameters that say who asks or why, and never change the answer.
_WITHOUT_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})

#: Tokens of a plain completion when the client sets no limit, as OpenAI documents it.
_COMPLETION_TOKENS = 16


class ApiError(Exception):
    """An answer other than 200, in OpenAI's error form."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        parameter: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.parameter, self.code, self.headers = status, kind, parameter, code, headers

    def body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.parameter, "code": self.code}}


def _text(content: Any) -> Any:
    """A message's content as one text: a string, or a list of text parts joined."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"only text parts are served, got {kind!r}")
        texts.append(part["text"])
    return "".join(texts)


def _single_prompt(prompt: Any) -> Any:
    """The one prompt of a list of prompts; a list of token ids is a prompt itself."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise ValueError("one prompt a request is served; send one request for each")
        return prompt[0]
    return prompt


def _stop_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a parameter leaves the answer as it is: null, without effect, or neutral (0 is not false, though equal)."""
    if value is None or name in _WITHOUT_EFFECT:
        return True
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL.get(name, ()))


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_values(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if not _asks_for_nothing(name, value)}


class Message(_Schema):
    """One message of a conversation."""

    role: str = Field(pattern="^(system|developer|user|assistant)$")
    content: Annotated[str, BeforeValidator(_text)]

    def as_template_input(self) -> dict[str, str]:
        """The message for the chat template, which knows `developer` under its older name."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(_Schema):
    """What a stream carries besides the text."""

    include_usage: bool = False


class GenerationRequest(_Schema):
    """What both endpoints take."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_stop_list)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, None for what the context leaves."""
        return self.max_tokens

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The engine's settings for this request."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=self.stop,
        )


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    prompt: Annotated[str | list[int], BeforeValidator(_single_prompt)]

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens or _COMPLETION_TOKENS


Request = TypeVar("Request", bound=GenerationRequest)


def read_request(kind: type[Request], body: bytes) -> Request:
    """The request in a body of JSON. Raises ApiError (400) that names the first parameter it cannot serve."""
    try:
        values = json.loads(body)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError("the body must be a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    problem = error.errors()[0]
    parameter = ""
    for step in problem["loc"]:
        if isinstance(step, int):
            parameter += f"[{step}]"
        elif step not in ("str", "list[int]"):  # how pydantic tells the members of a union apart
            parameter += f".{step}" if parameter else step
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])
        if name in _NEUTRAL:
            neutral = ", ".join(json.dumps(value) for value in _NEUTRAL[name])
            message, code = f"'{parameter}' is not supported by this server (only {neutral})", "unsupported_parameter"
        else:
            message, code = f"unrecognized request argument: '{parameter}'", "unknown_parameter"
    elif problem["type"] == "missing":
        message, code = f"missing required parameter: '{parameter}'", "missing_required_parameter"
    else:
        reason = problem["msg"].removeprefix("Value error, ")
        message, code = f"invalid '{parameter}': {reason}" if parameter else reason, "invalid_value"
    return ApiError(message, parameter=parameter or None, code=code)
