"""Hooks inspect a turn and change it; retrieval and guards are hooks. Client-side tool calls are checked by them first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from bessemer.assistant.config import Principal
from bessemer.assistant.conversation import Conversation
from bessemer.assistant.generation import Draft
from bessemer.assistant.messages import BadCall, Called, DraftEvent, ToolCall
from bessemer.assistant.tools import Tool, ToolResult


@dataclass(frozen=True)
class TurnContext:
    """What a hook is told: the conversation, in whose name it is held, and where the turn is. round counts from 1, attempt
    from 0."""

    conversation: Conversation
    principal: Principal
    round: int = 1
    attempt: int = 0


@dataclass(frozen=True)
class Pass:
    """All of the draft so far may be given out."""


@dataclass(frozen=True)
class Wait:
    """Nothing more of the draft may be given out yet."""


@dataclass(frozen=True)
class Retry:
    """The draft is dropped and the message generated again. instruction: added for the next attempt, as the system's words."""

    reason: str
    instruction: str = ""


@dataclass(frozen=True)
class Refuse:
    """The draft is dropped, and this is the answer."""

    reason: str
    text: str


@dataclass(frozen=True)
class Deny:
    """The call is not carried out; the assistant is told the reason."""

    reason: str


Decision = Pass | Wait | Retry | Refuse


class Hook:
    """Does nothing: a hook overrides what it needs.

    holds_back: whether nothing of a message is given out before `check` lets it pass.
    """

    holds_back: bool = False

    def before_generation(self, context: TurnContext) -> None:
        """Before each round: may add parts to the conversation's last message, or messages, and change nothing else of it."""

    def check(self, draft: Draft, context: TurnContext, *, is_final: bool) -> Decision:
        """May the draft be given out? Asked when the message is complete, and before as it grows where the hook holds back.

        `Wait` for a complete message is `Pass`.
        """
        return Pass()

    def before_call(self, call: ToolCall, tool: Tool, context: TurnContext) -> ToolCall | Deny:
        """Before a tool is called: the call, perhaps with other arguments.

        Of one that the caller of the turn runs, it is asked before the call is given out, and its arguments stand in the
        message; one that is denied is never given out.
        """
        return call

    def after_call(self, call: ToolCall, result: ToolResult, context: TurnContext) -> ToolResult:
        """After a call: what the assistant is told."""
        return result


@dataclass(frozen=True)
class Hooks:
    """Several hooks, asked in their order."""

    hooks: tuple[Hook, ...] = ()
    #: Those that hold back.
    holding: tuple[Hook, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "holding", tuple(hook for hook in self.hooks if hook.holds_back))

    def before_generation(self, context: TurnContext) -> None:
        """Ask all."""
        for hook in self.hooks:
            hook.before_generation(context)

    def check(self, draft: Draft, context: TurnContext, *, is_final: bool) -> Decision:
        """The first decision to retry or refuse; else `Wait` where one waits, which is none for a complete message."""
        decision: Decision = Pass()
        for hook in self.hooks if is_final else self.holding:
            found = hook.check(draft, context, is_final=is_final)
            if isinstance(found, Retry | Refuse):
                return found
            if isinstance(found, Wait) and not is_final:
                decision = found
        return decision

    def before_call(self, call: ToolCall, tool: Tool, context: TurnContext) -> ToolCall | Deny:
        """The call as all of them change it, or the first denial."""
        for hook in self.hooks:
            found = hook.before_call(call, tool, context)
            if isinstance(found, Deny):
                return found
            call = found
        return call

    def after_call(self, call: ToolCall, result: ToolResult, context: TurnContext) -> ToolResult:
        """The result as all of them change it."""
        for hook in self.hooks:
            result = hook.after_call(call, result, context)
        return result


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
