"""Tools and structured outputs of OpenAI's API, and of vLLM's where OpenAI's has none."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from bessemer.assistant.tools import Tool, ToolChoice
from bessemer.core.errors import ConfigError
from bessemer.serving.runtime.bodies import ApiError, Body, misfit

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


def in_json(schema: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for NaN and infinities, which Python reads in JSON."""
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


def tools_of(tools: Iterable[FunctionTool]) -> list[Tool]:
    """The assistant's tools, which the client runs. Raises as `checked_tools`."""
    functions = [tool.function for tool in tools]
    return checked_tools(
        ((function.name, function.description, function.parameters, function.strict) for function in functions), ".function"
    )


def checked_tools(given: Iterable[tuple[str, str, dict[str, Any], bool]], inside: str = "") -> list[Tool]:
    """Tools from name, description, schema, and whether the schema is strict. inside: the path of the name in an item of
    `tools`.

    Raises ApiError for an invalid schema and for two tools of one name.
    """
    tools: list[Tool] = []
    for index, (name, description, schema, is_strict) in enumerate(given):
        path = f"tools[{index}]{inside}"
        if any(tool.name == name for tool in tools):
            raise ApiError(f"two tools are called '{name}'", parameter=f"{path}.name", code="invalid_value")
        try:
            tools.append(Tool(name, description, schema, is_strict=is_strict))
        except ConfigError as error:
            raise ApiError(str(error), parameter=f"{path}.parameters", code="invalid_value") from None
    return tools


def choice_of(choice: Choice, in_parallel: bool) -> ToolChoice:
    """Which of the tools may or must be called. With "none", no tools are offered at all."""
    if isinstance(choice, NamedTool):
        return ToolChoice(must_call=True, name=choice.function.name, in_parallel=in_parallel)
    return ToolChoice(must_call=choice == "required", in_parallel=in_parallel)


#: Any JSON object.
_ANY_OBJECT = {"type": "object"}


class GrammarSetting(NamedTuple):
    """A constraint on the text: the client's parameter, the engine's setting, and its value."""

    parameter: str
    setting: Literal["json_schema", "regex", "choice", "ebnf"]
    value: Any


class JsonSchema(Body):
    """A schema as OpenAI's clients send it. It is always followed strictly."""

    name: str
    description: str | None = None
    definition: dict[str, Any] = Field(_ANY_OBJECT, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_is_said(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise misfit("response_format", "response_format: type json_schema and a json_schema go together")
        return self

    def grammar(self) -> GrammarSetting:
        """The constraint on the text."""
        schema = _ANY_OBJECT if self.json_schema is None else self.json_schema.definition
        return GrammarSetting("response_format", "json_schema", schema)


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: one of its kinds."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar_text: str | None = Field(None, alias="grammar")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if len(self._given()) != 1:
            raise misfit("structured_outputs", "structured_outputs: give one of json, json_object, regex, choice and grammar")
        return self

    def _given(self) -> list[GrammarSetting]:
        kinds = [
            GrammarSetting("structured_outputs", "json_schema", self.json_schema),
            GrammarSetting("structured_outputs", "json_schema", _ANY_OBJECT if self.json_object else None),
            GrammarSetting("structured_outputs", "regex", self.regex),
            GrammarSetting("structured_outputs", "choice", self.choice),
            GrammarSetting("structured_outputs", "ebnf", self.grammar_text),
        ]
        return [grammar for grammar in kinds if grammar.value is not None]

    def grammar(self) -> GrammarSetting:
        """The constraint on the text."""
        return self._given()[0]
