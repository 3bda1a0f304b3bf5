"""What clients may ask, in OpenAI's words, and how they are refused.

A parameter that would change the answer and is not served is refused by name, never ignored; the same parameter at
the value that changes nothing (`store: false`, `tools: []`, `null` anywhere) is accepted, because clients send it.
Parameters that OpenAI's API does not have are called as vLLM calls them.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from bessemer.inference.sampling import SamplingParams

#: Parameters of OpenAI's API that are not served, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_obfuscation": (False,),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
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

#: The most answers to one prompt, as OpenAI documents it.
_MOST_CHOICES = 128
#: The most likeliest tokens that are told beside each token's own log-probability.
_MOST_LIKELIEST = 20

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


def _by_token(bias: Any) -> Any:
    """A bias by token id, from JSON's texts."""
    if not isinstance(bias, dict):
        return bias
    if wrong := next((key for key in bias if not (isinstance(key, str) and key.isascii() and key.isdigit())), None):
        raise ValueError(f"its keys are token ids, got {wrong!r}")
    return {int(key): value for key, value in bias.items()}


def _misfit(parameter: str, message: str) -> PydanticCustomError:
    """Why a parameter does not fit what the others say."""
    return PydanticCustomError("misfit", "{message}", {"parameter": parameter, "message": message})


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
    """What both endpoints take. The fields in `_SHARED` mean what they mean in `SamplingParams`."""

    model: str
    n: int = Field(1, ge=1, le=_MOST_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    typical_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_by_token)] = {}
    allowed_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    seed: int | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_stop_list)] = []
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options and not self.stream:
            raise _misfit("stream_options", "stream_options needs stream: true")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, None for what the context leaves."""
        return self.max_tokens

    @property
    def answers(self) -> int:
        """How many answers are made."""
        return self.n

    @property
    def wants_log_probs(self) -> bool:
        """Whether the answer comes with log-probabilities."""
        return False

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The engine's settings for this request. Raises ApiError (400) where the limit is too low for `min_tokens`."""
        if self.min_tokens > max_tokens:
            raise ApiError(
                f"min_tokens ({self.min_tokens}) is above the most tokens that may come ({max_tokens}); lower it",
                parameter="min_tokens",
                code="invalid_value",
            )
        shared = {name: getattr(self, name) for name in _SHARED}
        return SamplingParams(max_tokens=max_tokens, allowed_tokens=self.allowed_token_ids, **shared, **self._own_settings())

    def parameter_in(self, reason: str) -> str | None:
        """Which parameter the engine's reason is about: it begins with the name, where it is about one."""
        name = re.split(r"\W", reason, maxsplit=1)[0]
        name = _OWN_NAMES.get(name, name)
        return name if name in type(self).model_fields else None

    def _own_settings(self) -> dict[str, Any]:
        """Settings that only one endpoint has, or calls by another name."""
        return {}


#: What clients call differently from the engine.
_OWN_NAMES = {"allowed_tokens": "allowed_token_ids"}
#: Parameters of a request that are called in the engine as clients call them.
_SHARED = tuple(GenerationRequest.model_fields.keys() & SamplingParams.model_fields.keys() - {"max_tokens"})


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=_MOST_LIKELIEST)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise _misfit("max_completion_tokens", "max_tokens and max_completion_tokens differ; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise _misfit("top_logprobs", "top_logprobs needs logprobs: true")
        return self

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

    prompt: Annotated[str | list[int], BeforeValidator(_single_prompt)]
    best_of: int | None = Field(None, ge=1, le=_MOST_CHOICES)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=_MOST_LIKELIEST)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise _misfit("best_of", f"best_of ({self.best_of}) is below n ({self.n}); raise it or leave it out")
        if self.stream and self.answers > self.n:
            raise _misfit("best_of", "the best of several answers is known at their end; leave out best_of, or stream")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens or _COMPLETION_TOKENS

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
            "prompt_logprobs": self.logprobs if self.echo else None,
        }


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
    elif problem["type"] == "misfit":
        parameter, message, code = problem["ctx"]["parameter"], problem["msg"], "invalid_value"
    else:
        reason = problem["msg"].removeprefix("Value error, ")
        message, code = f"invalid '{parameter}': {reason}" if parameter else reason, "invalid_value"
    return ApiError(message, parameter=parameter or None, code=code)
