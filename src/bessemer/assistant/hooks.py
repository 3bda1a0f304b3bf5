"""Hooks inspect and change a turn, as retrieval and guardrails do. They check client-side tool calls first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from bessemer.assistant.conversation import Conversation, Principal
from bessemer.assistant.generation import MessageDraft
from bessemer.assistant.messages import BadCall, Called, DraftEvent, Message, ToolCall
from bessemer.assistant.tools import Tool, ToolResult


@dataclass(frozen=True)
class TurnContext:
    """The state of a turn for its hooks. round: counts from 1; attempt: of this round's message, from 0. answer_prefix: the
    beginning of the first round's message, which a client wrote."""

    conversation: Conversation
    principal: Principal
    round: int = 1
    attempt: int = 0
    answer_prefix: str = ""


@dataclass(frozen=True)
class Pass:
    """The draft so far may be given out."""


@dataclass(frozen=True)
class Wait:
    """No more of the draft may be given out yet."""


@dataclass(frozen=True)
class Retry:
    """The draft is dropped and generated again. instruction: added as a system part for the next attempt."""

    reason: str
    instruction: str = ""


@dataclass(frozen=True)
class Refuse:
    """The draft is dropped, and `text` is the answer. keeps_shown: what was given out of the draft stays, and `text` follows
    it; without it, that is withdrawn."""

    reason: str
    text: str
    keeps_shown: bool = False


@dataclass(frozen=True)
class Deny:
    """The call is not made; its result is the reason."""

    reason: str


Decision = Pass | Wait | Retry | Refuse


class Hook:
    """A hook that does nothing; override what you need. holds_back: whether a message waits for `check` before it is given
    out. takes_long: whether `check` waits for something, so that a server calls it in a thread."""

    holds_back: bool = False
    takes_long: bool = False

    def read(self, message: Message, context: TurnContext) -> Message:
        """A message that the assistant has not read yet, as it may read it. Called once for each at the beginning of a turn."""
        return message

    def admit(self, context: TurnContext) -> Refuse | None:
        """A refusal ends the turn without a completion. Called after `before_generation` of all hooks."""
        return None

    def before_generation(self, context: TurnContext) -> None:
        """Before each round. May add messages, or parts to the last message, and nothing else."""

    def check(self, draft: MessageDraft, context: TurnContext, *, is_final: bool) -> Decision:
        """Whether the draft may be given out. Called for a complete message, and for a growing one if the hook holds back.

        `Wait` counts as `Pass` for a complete message.
        """
        return Pass()

    def before_call(self, call: ToolCall, tool: Tool, context: TurnContext) -> ToolCall | Deny:
        """Before a tool is called. Returns the call, perhaps with other arguments.

        A client-side call is checked before it is given out: with the arguments returned here, or not at all if denied.
        """
        return call

    def after_call(self, call: ToolCall, result: ToolResult, context: TurnContext) -> ToolResult:
        """After a call. Returns the result for the assistant."""
        return result


@dataclass(frozen=True)
class Hooks:
    """Several hooks, called in their order."""

    hooks: tuple[Hook, ...] = ()
    #: The hooks that hold back.
    holding: tuple[Hook, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "holding", tuple(hook for hook in self.hooks if hook.holds_back))

    def read(self, message: Message, context: TurnContext) -> Message:
        """The message as changed by all hooks."""
        for hook in self.hooks:
            message = hook.read(message, context)
        return message

    def before_generation(self, context: TurnContext) -> None:
        for hook in self.hooks:
            hook.before_generation(context)

    def admit(self, context: TurnContext) -> Refuse | None:
        """The first refusal."""
        return next((refusal for hook in self.hooks if (refusal := hook.admit(context)) is not None), None)

    def check(self, draft: MessageDraft, context: TurnContext, *, is_final: bool) -> Decision:
        """The first decision to retry or refuse; else `Wait` if a hook waits and the message is not complete."""
        decision: Decision = Pass()
        for hook in self.hooks if is_final else self.holding:
            new = hook.check(draft, context, is_final=is_final)
            if isinstance(new, Retry | Refuse):
                return new
            if isinstance(new, Wait) and not is_final:
                decision = new
        return decision

    def before_call(self, call: ToolCall, tool: Tool, context: TurnContext) -> ToolCall | Deny:
        """The call as changed by all hooks, or the first denial."""
        for hook in self.hooks:
            decision = hook.before_call(call, tool, context)
            if isinstance(decision, Deny):
                return decision
            call = decision
        return call

    def after_call(self, call: ToolCall, result: ToolResult, context: TurnContext) -> ToolResult:
        """The result as changed by all hooks."""
        for hook in self.hooks:
            result = hook.after_call(call, result, context)
        return result


class ClientCalls:
    """The hooks' verdicts on client-side calls of a turn. Without hooks, every call is allowed."""

    def __init__(self, tools: Mapping[str, Tool], hooks: Hooks) -> None:
        self._tools = tools
        self._hooks = hooks
        self._verdicts: dict[str, ToolCall | Deny] = {}

    def awaits_verdict(self, call: ToolCall | BadCall) -> TypeGuard[ToolCall]:
        """Whether a call is client-side, and the hooks have not decided about it."""
        return bool(self._hooks.hooks) and self._is_client_side(call) and call.id not in self._verdicts

    def waits_for_client(self, call: ToolCall | BadCall) -> bool:
        """Whether a call is client-side and allowed."""
        return self._is_client_side(call) and not isinstance(self.verdict(call), Deny)

    def decide(self, calls: Iterable[ToolCall | BadCall], context: TurnContext) -> bool:
        """Ask the hooks about the calls without a verdict. Returns whether there was one."""
        awaiting = [call for call in calls if self.awaits_verdict(call)]
        for call in awaiting:
            self._verdicts[call.id] = self._hooks.before_call(call, self._tools[call.name], context)
        return bool(awaiting)

    def verdict(self, call: ToolCall) -> ToolCall | Deny | None:
        """The verdict on a call; None where there is none yet."""
        return self._verdicts.get(call.id)

    def as_allowed(self, call: ToolCall) -> ToolCall:
        """A call with the arguments that the hooks allowed."""
        allowed = self.verdict(call)
        return replace(call, arguments=allowed.arguments) if isinstance(allowed, ToolCall) else call

    def decided(self, events: Sequence[DraftEvent]) -> list[DraftEvent]:
        """Events with the allowed calls, and without denied ones."""
        return [
            Called(self.as_allowed(event.call)) if isinstance(event, Called) else event
            for event in events
            if not (isinstance(event, Called) and isinstance(self.verdict(event.call), Deny))
        ]

    def _is_client_side(self, call: ToolCall | BadCall) -> TypeGuard[ToolCall]:
        tool = None if isinstance(call, BadCall) else self._tools.get(call.name)
        return tool is not None and tool.function is None
