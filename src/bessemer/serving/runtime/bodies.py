"""Request bodies in JSON, and the errors that answer them.

No field is ignored. An unsupported parameter is refused by name, but accepted at a value that changes nothing (`logprobs:
false`, `tools: []`, `null` anywhere), because clients send it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from bessemer.serving.config import (
    CONTAINERS,
    FIELDS,
    METADATA,
    METADATA_KEY,
    METADATA_VALUE,
    NAME,
    PARSED_AT_ONCE,
    VALUES,
)

#: Unsupported parameters of OpenAI's API, with the values that change nothing.
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
    # chats are never stored
    "store": (False, True),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1,),
    "top_logprobs": (0,),
    "verbosity": ("low", "medium", "high"),
    # fields of an answer that a client sends back as a message
    "annotations": ([],),
    "tool_calls": ([],),
}
#: Parameters that describe the client or its purpose, and never change the completion.
_WITHOUT_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})
#: Most characters of a request that its error repeats.
_REPEATED = 1_000
#: The name of a model, or of an earlier response.
Name = Annotated[str, Field(max_length=NAME.most)]


def few_pairs(metadata: Any) -> Any:
    """Raises ValueError for more pairs than are kept, before each is looked at."""
    if isinstance(metadata, dict) and len(metadata) > METADATA.most:
        raise ValueError(f"it has {len(metadata):,} pairs, at most {METADATA.most} are kept")
    return metadata


MetadataKey = Annotated[str, Field(max_length=METADATA_KEY.most)]
MetadataText = Annotated[str, Field(max_length=METADATA_VALUE.most)]
#: What a client says of something that is kept for it.
Metadata = Annotated[dict[MetadataKey, MetadataText], BeforeValidator(few_pairs)]


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
        """The error in OpenAI's form."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.parameter, "code": self.code}}


#: An absolute path of at least two parts, which is no part of an address.
_ABSOLUTE_PATH = re.compile(r"(?<![\w/.:-])/[^\s/:,;'\"`()\[\]{}]+(?:/[^\s/:,;'\"`()\[\]{}]*)+")


def without_places(text: str) -> str:
    """A text in which every path of this machine is its last name: where files lie is not for clients."""

    def name_alone(path: re.Match[str]) -> str:
        # a route of the API has the form of a path too
        return Path(path[0]).name if Path("/", path[0].split("/")[1]).is_dir() else path[0]

    return _ABSOLUTE_PATH.sub(name_alone, text)


def overloaded(reason: str, retry_after: int = 1, headers: Mapping[str, str] | None = None) -> ApiError:
    """A refusal for now (503). retry_after: in seconds."""
    return ApiError(
        reason,
        status=503,
        kind="server_error",
        code="server_overloaded",
        headers={"Retry-After": str(retry_after), **(headers or {})},
    )


def withdrawn(reason: str) -> ApiError:
    """A hook took back text that the client has received, or ended the answer."""
    return ApiError(f"the answer was withdrawn: {reason}", status=500, kind="server_error", code="withdrawn")


def misfit(parameter: str, message: str) -> PydanticCustomError:
    """The error of a parameter that contradicts another one."""
    return PydanticCustomError("misfit", "{message}", {"parameter": parameter, "message": message})


def _changes_nothing(name: str, value: Any) -> bool:
    """Whether a parameter leaves the completion as it is. 0 is not taken for false, though Python calls them equal."""
    if value is None or name in _WITHOUT_EFFECT:
        return True
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL.get(name, ()))


def _end_at_first_error(schema: Any) -> None:
    """Let the check of a list end at its first wrong item: a million errors take seconds, and only one is reported."""
    if isinstance(schema, list | tuple):
        for part in schema:
            _end_at_first_error(part)
    elif isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for name, part in schema.items():
            if name not in ("metadata", "serialization", "default"):
                _end_at_first_error(part)


class Body(BaseModel):
    """A body, or an object in one: unknown names and other types than those declared are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())
    #: Fields of `_NEUTRAL` that this body supports: only null is left out.
    meaningful: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_values(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > FIELDS.most:
            # checked first, since pydantic would make an error for each unknown name
            raise ValueError(f"an object has {len(values):,} names, of which at most {FIELDS.most:,} are read")
        return {
            name: value
            for name, value in values.items()
            if not (value is None if name in cls.meaningful else _changes_nothing(name, value))
        }

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _end_at_first_error(schema)
        return schema


Request = TypeVar("Request", bound="Body")


async def read_body(kind: type[Request], request: HttpRequest) -> Request:
    """Parse the body of an HTTP request, a large one in a thread. Raises as `read_request`."""
    body = await request.body()
    if len(body) <= PARSED_AT_ONCE:
        return read_request(kind, body)
    return await asyncio.to_thread(read_request, kind, body)


def read_request(kind: type[Request], body: bytes) -> Request:
    """Parse a JSON object. Raises ApiError (400), which names the first parameter that is wrong or unsupported."""
    values = read_json(body)
    if not isinstance(values, dict):
        raise ApiError("the body must be a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None


def read_json(body: bytes) -> Any:
    """Parse JSON. Raises ApiError (400), also for texts that have no UTF-8 and for too many values."""
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


#: An escaped surrogate in JSON. Two in a row are one character, one alone is none.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
#: A JSON string.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def _check_values(body: bytes) -> None:
    """Raise ApiError for too many values, before they are parsed. Brackets and commas are counted: a value follows each."""
    most, most_containers = VALUES.most, CONTAINERS.most
    values, containers = _counts(body, 0, len(body))
    if values <= most and containers <= most_containers:
        return
    # brackets and commas inside strings do not count
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
    """Number of values, and of the lists and objects among them."""
    containers = body.count(b"[", start, end) + body.count(b"{", start, end)
    return containers + body.count(b",", start, end), containers


def _check_texts(values: Any) -> None:
    """Raise ApiError for a lone surrogate: it is no character, and encoding it would fail later."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ApiError(f"the body has {half} alone, half of a character; send both halves, or none") from None


#: Steps of pydantic's error locations that name a union's branch instead of a field.
_UNION_BRANCH = re.compile(
    r"str|NamedTool|FlatTool|FileSearchTool|TextPart|ImagePart|InputMessage|ReasoningItem|CallItem|CallOutput|FileSearchItem"
    r"|CompactionItem|Comparison|Compound|InnerCompound|(list|dict|literal|function-[a-z]+|tagged-union)\[.*",
    re.DOTALL,
)


def _refusal(error: ValidationError) -> ApiError:
    """The API's error of the first problem. A union has an error for each branch: the deepest one says most."""
    first, *others = error.errors()
    same_field = [other for other in others if other["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
    is_union = first["loc"][-1:] == ("str",)
    problem = max([first, *same_field], key=lambda problem: len(problem["loc"])) if is_union else first
    parameter = ""
    for step in problem["loc"]:
        if isinstance(step, int):
            parameter += f"[{step}]"
        elif not _UNION_BRANCH.fullmatch(step):
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
        # the location is the object, and the parameter one of its fields
        if parameter and not parameter.endswith(name):
            parameter += f".{name}"
            message = f"invalid '{parameter}': {message}"
        parameter = parameter or name
    else:
        reason = problem["msg"].removeprefix("Value error, ")
        message, code = f"invalid '{parameter}': {reason}" if parameter else reason, "invalid_value"
    parameter = parameter[:_REPEATED]
    return ApiError(message[:_REPEATED], parameter=parameter or None, code=code)
