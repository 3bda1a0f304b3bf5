"""Request bodies in JSON: nothing in them is ignored, and what is refused is named.

A parameter that would change the answer and is not served is refused by name; the same parameter at the value that changes
nothing (`logprobs: false`, `tools: []`, `null` anywhere) is accepted, because clients send it.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Annotated, Any, ClassVar, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from bessemer.serving import config as limits

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
    # nothing is stored of a chat, and how wordy it is the model chooses
    "store": (False, True),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1,),
    "top_logprobs": (0,),
    "verbosity": ("low", "medium", "high"),
    # of a message that an earlier answer is sent back as
    "annotations": ([],),
    "tool_calls": ([],),
}
#: Parameters that name the client or its purpose, and never change the completion.
_WITHOUT_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})


#: Characters that a refusal repeats of a request.
_REPEATED = 1_000

#: The name of a model, or of an earlier response.
Name = Annotated[str, Field(max_length=limits.NAME.most)]


class ApiError(Exception):
    """A response other than 200, in OpenAI's error form."""

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
        self.status = status
        self.kind = kind
        self.parameter = parameter
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.parameter, "code": self.code}}


def misfit(parameter: str, message: str) -> PydanticCustomError:
    """The error of a parameter that does not fit the others."""
    return PydanticCustomError("misfit", "{message}", {"parameter": parameter, "message": message})


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a parameter leaves the completion as it is: null, without effect, or neutral (0 is not false, though equal)."""
    if value is None or name in _WITHOUT_EFFECT:
        return True
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL.get(name, ()))


def _end_at_first_error(schema: Any) -> None:
    """Let the check of a list end at its first wrong item: an error for each of a million costs seconds, and one is told."""
    if isinstance(schema, list | tuple):
        for one in schema:
            _end_at_first_error(one)
    elif isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for name, one in schema.items():
            if name not in ("metadata", "serialization", "default"):
                _end_at_first_error(one)


class Body(BaseModel):
    """A body, or an object in one: unknown names and other types than those declared are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())
    #: Fields whose every value but null means something here.
    meaningful: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_values(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > limits.FIELDS.most:
            # each unknown one would be an error of its own
            raise ValueError(f"an object has {len(values):,} names, of which at most {limits.FIELDS.most:,} are read")
        return {
            name: value
            for name, value in values.items()
            if not (value is None if name in cls.meaningful else _asks_for_nothing(name, value))
        }

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _end_at_first_error(schema)
        return schema


Request = TypeVar("Request", bound="Body")


async def read_body(kind: type[Request], request: HttpRequest) -> Request:
    """The request in the body of an HTTP request; a large one is parsed beside the event loop. Raises as `read_request`."""
    body = await request.body()
    if len(body) <= limits.PARSED_AT_ONCE:
        return read_request(kind, body)
    return await asyncio.to_thread(read_request, kind, body)


def read_request(kind: type[Request], body: bytes) -> Request:
    """The request in a body of JSON. Raises ApiError (400) that names the first parameter it cannot serve."""
    values = read_json(body)
    if not isinstance(values, dict):
        raise ApiError("the body must be a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None


def read_json(body: bytes) -> Any:
    """The value in a body of JSON, whose texts are all UTF-8. Raises ApiError (400)."""
    _check_values(body)
    try:
        text = body.decode("utf-8-sig")
        values = json.loads(text)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError("the body is nested too deep") from None
    if _SURROGATE.search(text):
        _check_texts(values)
    return values


#: How half of a surrogate pair is written in JSON; two in a row are one character.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
#: A text in JSON.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def _check_values(body: bytes) -> None:
    """Refuse a body with too many values before they are made. A value begins behind a bracket or a comma."""
    most, most_containers = limits.VALUES.most, limits.CONTAINERS.most
    values, containers = _counts(body, 0, len(body))
    if values <= most and containers <= most_containers:
        return
    # they may stand in texts
    values = containers = start = 0
    for text in _TEXT.finditer(body):
        more, more_containers = _counts(body, start, text.start())
        values, containers, start = values + more, containers + more_containers, text.end()
        if values > most or containers > most_containers:
            break
    else:
        more, more_containers = _counts(body, start, len(body))
        values, containers = values + more, containers + more_containers
    if values > most:
        raise ApiError(f"the body has more than {most:,} values, the most that this server reads")
    if containers > most_containers:
        raise ApiError(f"the body has more than {most_containers:,} lists and objects, the most that this server reads")


def _counts(body: bytes, start: int, end: int) -> tuple[int, int]:
    """Values, and lists and objects among them."""
    containers = body.count(b"[", start, end) + body.count(b"{", start, end)
    return containers + body.count(b",", start, end), containers


def _check_texts(values: Any) -> None:
    """Refuse half of a surrogate pair, which is no character and has no UTF-8: it would fail wherever it is written."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ApiError(f"the body has {half} alone, half of a character; send both halves, or none") from None


#: How pydantic tells the kinds of a value apart.
_OF_A_KIND = re.compile(r"str|NamedTool|(list|dict|literal|function-[a-z]+|tagged-union)\[.*", re.DOTALL)


def _refusal(error: ValidationError) -> ApiError:
    # of a value that may be of several kinds there is an error for each: what is wrong within the nearest kind says most
    first, *others = error.errors()
    same = [one for one in others if one["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
    problem = max([first, *same], key=lambda one: len(one["loc"])) if first["loc"][-1:] == ("str",) else first
    parameter = ""
    for step in problem["loc"]:
        if isinstance(step, int):
            parameter += f"[{step}]"
        elif not _OF_A_KIND.fullmatch(step):
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
        name, message, code = problem["ctx"]["parameter"], problem["msg"], "invalid_value"
        # the whole object does not fit, or one of its fields
        if parameter and not parameter.endswith(name):
            parameter += f".{name}"
            message = f"invalid '{parameter}': {message}"
        parameter = parameter or name
    else:
        reason = problem["msg"].removeprefix("Value error, ")
        message, code = f"invalid '{parameter}': {reason}" if parameter else reason, "invalid_value"
    parameter = parameter[:_REPEATED]
    return ApiError(message[:_REPEATED], parameter=parameter or None, code=code)
