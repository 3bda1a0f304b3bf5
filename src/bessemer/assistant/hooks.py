"""Hooks: what may look at a turn and change it. Retrieval and guards are hooks."""

from __future__ import annotations

from dataclasses import dataclass, field

from bessemer.assistant.conversation import Conversation
from bessemer.assistant.draft import Draft
from bessemer.assistant.messages import ToolCall
from bessemer.assistant.principal import Principal
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
