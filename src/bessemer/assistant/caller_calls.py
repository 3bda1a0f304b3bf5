"""Calls of tools that the caller of a turn runs: what the hooks say of them, before anybody is given one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeGuard

from bessemer.assistant.events import BadCall, Called, DraftEvent
from bessemer.assistant.hooks import Deny, Hooks, TurnContext
from bessemer.assistant.messages import ToolCall
from bessemer.assistant.tools import Tool


class CallerCalls:
    """The verdicts of a turn, by the ids of the calls. Where there are no hooks, every call may be made as it is."""

    def __init__(self, tools: Mapping[str, Tool], hooks: Hooks) -> None:
        self._tools = tools
        self._hooks = hooks
        self._verdicts: dict[str, ToolCall | Deny] = {}

    def awaits_verdict(self, call: ToolCall | BadCall) -> TypeGuard[ToolCall]:
        """Whether the caller would run a call, and the hooks have not been asked about it."""
        return bool(self._hooks.hooks) and self._is_callers(call) and call.id not in self._verdicts

    def waits_for_caller(self, call: ToolCall | BadCall) -> bool:
        """Whether the caller runs a call, and may."""
        return self._is_callers(call) and not isinstance(self.verdict(call), Deny)

    def decide(self, calls: Iterable[ToolCall | BadCall], context: TurnContext) -> bool:
        """Ask the hooks about the calls that await it. Returns whether there was one."""
        awaiting = [call for call in calls if self.awaits_verdict(call)]
        for call in awaiting:
            self._verdicts[call.id] = self._hooks.before_call(call, self._tools[call.name], context)
        return bool(awaiting)

    def verdict(self, call: ToolCall) -> ToolCall | Deny | None:
        """What the hooks have said of a call; None where they were not asked."""
        return self._verdicts.get(call.id)

    def as_allowed(self, call: ToolCall) -> ToolCall:
        """A call with the arguments that the hooks gave it."""
        allowed = self.verdict(call)
        return replace(call, arguments=allowed.arguments) if isinstance(allowed, ToolCall) else call

    def decided(self, events: Sequence[DraftEvent]) -> list[DraftEvent]:
        """Events with the calls as they are allowed, and without those that are denied."""
        return [
            Called(self.as_allowed(event.call)) if isinstance(event, Called) else event
            for event in events
            if not (isinstance(event, Called) and isinstance(self.verdict(event.call), Deny))
        ]

    def _is_callers(self, call: ToolCall | BadCall) -> TypeGuard[ToolCall]:
        tool = None if isinstance(call, BadCall) else self._tools.get(call.name)
        return tool is not None and tool.function is None
