"""Tools in the words of chat completions, and which of them may be called."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from bessemer.assistant.tools import Tool, ToolChoice
from bessemer.core.errors import ConfigError
from bessemer.serving.bodies import ApiError, Body

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


def in_json(schema: dict[str, Any]) -> dict[str, Any]:
    """Python reads NaN and infinities in JSON, which has none."""
    json.dumps(schema, allow_nan=False)
    return schema


class Function(Body):
    """A function that the client runs."""

    name: ToolName
    description: str = ""
    parameters: Annotated[dict[str, Any], AfterValidator(in_json)] = Field(_NO_ARGUMENTS)
    strict: bool = False


class FunctionTool(Body):
    """A tool of a request."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: ToolName


class NamedTool(Body):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


Choice = Literal["none", "auto", "required"] | NamedTool


def tools_of(given: list[FunctionTool], inside: str = ".function") -> list[Tool]:
    """The assistant's tools; the client runs them. inside: where a request has what is told of each.

    Raises ApiError for a schema that is none and for two of a name.
    """
    tools: list[Tool] = []
    for place, one in enumerate(given):
        function = one.function
        where = f"tools[{place}]{inside}"
        if any(tool.name == function.name for tool in tools):
            raise ApiError(f"two tools are called '{function.name}'", parameter=f"{where}.name", code="invalid_value")
        try:
            tools.append(Tool(function.name, function.description, function.parameters, is_strict=function.strict))
        except ConfigError as error:
            raise ApiError(str(error), parameter=f"{where}.parameters", code="invalid_value") from None
    return tools


def choice_of(choice: Choice, in_parallel: bool) -> ToolChoice:
    """Which of the tools may be called; those of "none" are not offered at all."""
    if isinstance(choice, NamedTool):
        return ToolChoice(must_call=True, name=choice.function.name, in_parallel=in_parallel)
    return ToolChoice(must_call=choice == "required", in_parallel=in_parallel)
