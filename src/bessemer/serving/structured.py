"""Structured outputs: constraints on a completion's text, in the parameters of OpenAI's API and of vLLM's."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from bessemer.serving.bodies import Body, misfit

#: Any JSON object.
_ANY_OBJECT = {"type": "object"}


class Grammar(NamedTuple):
    """A parameter's name, the engine's setting that it stands for, and its value."""

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

    def grammar(self) -> Grammar:
        """The grammar that it asks for."""
        schema = _ANY_OBJECT if self.json_schema is None else self.json_schema.definition
        return Grammar("response_format", "json_schema", schema)


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

    def _given(self) -> list[Grammar]:
        kinds = [
            Grammar("structured_outputs", "json_schema", self.json_schema),
            Grammar("structured_outputs", "json_schema", _ANY_OBJECT if self.json_object else None),
            Grammar("structured_outputs", "regex", self.regex),
            Grammar("structured_outputs", "choice", self.choice),
            Grammar("structured_outputs", "ebnf", self.grammar_text),
        ]
        return [grammar for grammar in kinds if grammar.value is not None]

    def grammar(self) -> Grammar:
        """The grammar that it asks for."""
        return self._given()[0]
