"""Tools: functions that the assistant may call. A failed call becomes a result that says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bessemer.core.concurrency import call_within
from bessemer.core.errors import ConfigError
from bessemer.core.json_schema import SchemaCheck, schema_check


@dataclass(frozen=True)
class ToolChoice:
    """Which tools the assistant may call. must_call: one, in the turn's first message. name: the only tool that may be called.
    in_parallel: whether a message may have several calls."""

    must_call: bool = False
    name: str | None = None
    in_parallel: bool = True


_ANYTHING: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class ToolResult:
    """The result of a call for the assistant. is_error: whether the call failed."""

    text: str
    is_error: bool = False


@dataclass(frozen=True)
class Tool:
    """A function with its description.

    parameters: JSON schema of an object with the arguments. function: None for a client-side tool, whose call ends the turn.
    time_limit: in seconds; outside the main thread, a call that takes longer goes on unobserved. groups: a principal must be in
    one of them; None: everybody may call it. most_characters: of a result. is_strict: whether a grammar holds calls to the
    schema.

    Raises ConfigError for an invalid schema, and without the package `jsonschema`.
    """

    name: str
    description: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: _ANYTHING)
    function: Callable[..., Any] | None = None
    time_limit: float = 30.0
    groups: frozenset[str] | None = None
    most_characters: int = 20_000
    is_strict: bool = False
    _check: SchemaCheck = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a tool needs a name")
        object.__setattr__(self, "_check", schema_check(self.parameters, f"the tool {self.name}"))

    @property
    def description_in_chat(self) -> dict[str, Any]:
        """The tool as chat completions describe it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """The function's result: a string or a `ToolResult` as it is, anything else as JSON. Failures are results too:
        arguments that do not fit the schema, an exception, the time limit."""
        assert self.function is not None, "the client runs this tool"
        function = self.function

        def carry_out() -> ToolResult:
            # within the time limit: a regular expression in the schema may be slow
            problem = self._check(dict(arguments))
            if problem is not None:
                return failed(f"the arguments do not fit: {problem}")
            value = function(**arguments)
            if isinstance(value, ToolResult):
                return replace(value, text=self._shown(value.text))
            return ToolResult(self._shown(value))

        try:
            return call_within(self.time_limit, carry_out)
        except TimeoutError as error:
            return failed(str(error) or "it timed out")
        except (Exception, SystemExit) as error:  # the assistant may try again
            return failed(f"{type(error).__name__}: {error}")

    def _shown(self, value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        # a lone surrogate has no UTF-8
        text = text.encode("utf-8", "replace").decode()
        left_out = len(text) - self.most_characters
        return text if left_out <= 0 else f"{text[: self.most_characters]}… ({left_out:,} more characters)"


def failed(reason: str) -> ToolResult:
    """The result of a failed call; the reason on one line."""
    reason = " ".join(reason.encode("utf-8", "replace").decode().split())
    return ToolResult(f"error: {reason[:500]}", is_error=True)
