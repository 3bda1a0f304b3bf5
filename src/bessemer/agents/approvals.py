"""A person's approval before a call: which calls ask, and how a person at a terminal answers.

An approval is a hook of the turn (`assistant/hooks.py`): a call that is not allowed is denied, and the assistant reads why.
Which calls a tainted conversation may make at all is decided by the policy's own hook, before anybody is asked.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from bessemer.agents.mcp_client import shown
from bessemer.assistant.hooks import Deny, Hook, TurnContext
from bessemer.assistant.messages import ToolCall
from bessemer.assistant.tools import Tool
from bessemer.core.errors import ConfigError

#: Why a call was not made, for the assistant.
DENIED = "the user did not allow this call; do not repeat it, go on without it or say what you need"


@dataclass(frozen=True)
class AsksFor:
    """Which calls ask a person first. patterns: names of tools, or patterns such as `files__*`; None: all."""

    patterns: tuple[str, ...] | None

    @classmethod
    def parse(cls, given: str) -> Self:
        """Of `always`, `never` or `tools=a,b`. Raises ConfigError for anything else."""
        if given == "always":
            return cls(None)
        if given == "never":
            return cls(())
        kind, is_list, names = given.partition("=")
        patterns = tuple(name for each in names.split(",") if (name := each.strip()))
        if kind != "tools" or not is_list or not patterns:
            raise ConfigError(f"--approve {given}: it is always, never, or tools=NAME,NAME")
        return cls(patterns)

    def includes(self, name: str) -> bool:
        """Whether calls of a tool ask."""
        return self.patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)


#: Whether a person allows a call.
Approver = Callable[[ToolCall, Tool], bool]


@dataclass
class Approvals(Hook):
    """Asks a person before the calls that `asks_for` includes."""

    asks_for: AsksFor
    approver: Approver

    def before_call(self, call: ToolCall, tool: Tool, context: TurnContext) -> ToolCall | Deny:
        if self.asks_for.includes(call.name) and not self.approver(call, tool):
            return Deny(DENIED)
        return call


@dataclass
class AskedOnce:
    """An approver that asks once about a call, although the guard and `Approvals` both want to know."""

    approver: Approver
    _answers: dict[str, bool] = field(default_factory=dict, init=False)

    def __call__(self, call: ToolCall, tool: Tool) -> bool:
        if call.id not in self._answers:
            self._answers[call.id] = self.approver(call, tool)
        return self._answers[call.id]


def nobody(call: ToolCall, tool: Tool) -> bool:
    """The approver where no person is there: nothing that asks is allowed."""
    return False


@dataclass
class TerminalApprover:
    """Asks at the terminal; `a` allows a tool's calls from then on.

    read: reads a line after a prompt. write: prints a line. What a model or a server wrote is shown without control characters,
    so that it cannot draw over the question.
    """

    read: Callable[[str], str] = input
    write: Callable[[str], None] = field(default=lambda line: print(line, file=sys.stderr))
    _allowed: set[str] = field(default_factory=set, init=False)

    def __call__(self, call: ToolCall, tool: Tool) -> bool:
        if call.name in self._allowed:
            return True
        self.write(f"the assistant wants to call {described(call.name, call.arguments)}")
        while True:
            try:
                answer = self.read("allow it? [y]es, [n]o, [a]lways this tool: ").strip().lower()
            except EOFError:
                return False
            if answer in ("a", "always"):
                self._allowed.add(call.name)
            if answer in ("y", "yes", "a", "always"):
                return True
            if answer in ("n", "no", ""):
                return False


def described(name: str, arguments: Any, longest: int = 600) -> str:
    """A call on one line, without control characters; of long arguments the beginning and the length."""
    text = json.dumps(arguments, ensure_ascii=False, default=str)
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    if len(text) > longest:
        text = f"{text[:longest]}… ({len(text):,} characters)"
    return f"{shown(name)} {text}"


def approver_here() -> Approver:
    """The person at the terminal, where there is one."""
    return TerminalApprover() if sys.stdin is not None and sys.stdin.isatty() else nobody
