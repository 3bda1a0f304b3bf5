"""An agent: messages and calls of tools until the task is done or a budget is used up, each step in a journal.

A step is one message of the assistant and the calls in it. Before a call the hooks decide: the policy's, then a person's
approval (`approvals.py`). A call is in the journal before it is made, and its result before anything else happens. After `kill
-9`, a call that was under way is not simply made again:

- a tool that is `is_repeatable` is called again, since twice is the same as once;
- one with `recover` looks at what it noted before the call (`note`), and says whether the call happened;
- for any other, the assistant is told that nobody knows, and decides what to look at: at most once, never twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from bessemer.agents.config import Budget
from bessemer.agents.journal import BegunCall, Journal, message_as_json
from bessemer.assistant.assistant import Assistant
from bessemer.assistant.conversation import LOCAL, Conversation, Principal
from bessemer.assistant.hooks import Deny, Hook, Hooks, TurnContext
from bessemer.assistant.messages import BadCall, Called, Event, Message, Returned, ToolCall, TurnEnd
from bessemer.assistant.tools import Tool, ToolResult, failed
from bessemer.assistant.turn import Turn
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_value
from bessemer.inference.sampling.params import SamplingParams

#: A call of these arguments whose results were the same so often is not made again.
_SAME_RESULTS = 3
#: Calls in a row that were refused for that, after which the agent stops.
_REFUSALS = 3


@dataclass(frozen=True)
class AgentTool:
    """A tool, and what is known about calling it twice.

    is_repeatable: twice is the same as once. note: what is written into the journal before a call, from its arguments: plain
    JSON. recover: given the arguments and that note, after a kill: the result of a call that happened; None: it did not happen.
    """

    tool: Tool
    is_repeatable: bool = False
    note: Callable[[Mapping[str, Any]], Any] | None = None
    recover: Callable[[Mapping[str, Any], Any], ToolResult | None] | None = None


EndReason = Literal["answer", "length", "refused", "steps", "tokens", "seconds", "loop"]

#: Why an agent stopped, in words.
REASONS: Mapping[EndReason, str] = {
    "answer": "the task is answered",
    "length": "the model's context, or max_tokens of a message, is used up",
    "refused": "a hook refused every attempt at a message",
    "steps": "the budget of steps is used up",
    "tokens": "the budget of tokens is used up",
    "seconds": "the budget of seconds is used up",
    "loop": "the assistant makes the same call again and again",
}


@dataclass(frozen=True)
class AgentEnd:
    """The last event. answer: the assistant's last text."""

    reason: EndReason
    answer: str
    steps: int
    tokens: int
    seconds: float


AgentEvent = Event | AgentEnd


@dataclass
class _LoopDetector:
    """Counts calls with the same arguments and the same result. A call whose results differ, as of a clock, is no loop."""

    _results: dict[str, list[str]] = field(default_factory=dict)
    refusals: int = 0

    def takes(self, call: ToolCall) -> bool:
        """Whether a call may be made again. Counts refusals in a row."""
        last = self._results.get(_identity(call), [])[-_SAME_RESULTS:]
        is_loop = len(last) == _SAME_RESULTS and len(set(last)) == 1
        self.refusals = self.refusals + 1 if is_loop else 0
        return not is_loop

    def add(self, call: ToolCall, result: ToolResult) -> None:
        self._results.setdefault(_identity(call), []).append(hash_value(result.text))


def _identity(call: ToolCall) -> str:
    return hash_value([call.name, dict(call.arguments)])


class Agent:
    """An assistant at work on the task of a journal."""

    def __init__(
        self,
        assistant: Assistant,
        tools: Sequence[AgentTool],
        journal: Journal,
        *,
        budget: Budget | None = None,
        params: SamplingParams | None = None,
        hooks: Sequence[Hook] = (),
        principal: Principal = LOCAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """params: of each message. hooks: the policy's first, then approvals. Raises ConfigError for two tools of one name, and
        for one that a client would run."""
        self._assistant = assistant
        self._tools = {tool.tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            names = [tool.tool.name for tool in tools]
            raise ConfigError(f"two tools are called {next(name for name in names if names.count(name) > 1)!r}")
        if client_side := next((tool.tool.name for tool in tools if tool.tool.function is None), None):
            raise ConfigError(f"the tool {client_side} has no function, and an agent has no client that runs it")
        self._journal = journal
        self._budget = budget or Budget()
        self._params = params or SamplingParams(max_tokens=1024)
        self._hooks = Hooks(tuple(hooks))
        self._principal = principal
        self._clock = clock
        self._detector = _LoopDetector()
        for call, result, how in journal.state.results:
            if how == "called":
                self._detector.add(call, result)
        #: Seconds of a message that was broken off.
        self._lost_seconds = 0.0

    def run(self) -> Generator[AgentEvent, None, None]:
        """Work until the end; the last event is an `AgentEnd`. What was done before is not repeated, and gives no events.

        Closed early, the task can be resumed. Raises RequestError for a conversation that does not fit, the model's errors, and
        StorageError where the journal cannot be written.
        """
        state = self._journal.state
        if not state.pending and state.messages and state.messages[-1].role == "assistant":
            # the last message was an answer; a killed process may not have written the end
            reason: EndReason = "length" if state.finish == "length" else "refused" if state.finish == "refused" else "answer"
            if state.end is None:
                self._journal.write("end", reason=reason, seconds=0.0)
            yield self._ended(reason)
            return
        conversation = Conversation(state.messages)
        end: EndReason | None = None
        while end is None:
            # before calls too: the assistant must be able to read what they give
            end = self._used_up()
            if end is None:
                end = yield from self._make_calls(conversation) if state.pending else self._message(conversation)
        self._journal.write("end", reason=end, seconds=self._lost_seconds)
        yield self._ended(end)

    def _ended(self, reason: EndReason) -> AgentEnd:
        state = self._journal.state
        answer = next((message.text for message in reversed(state.messages) if message.role == "assistant"), "")
        return AgentEnd(reason, answer, state.steps, state.tokens, state.seconds)

    def _used_up(self) -> EndReason | None:
        """The budget that is used up."""
        state, budget = self._journal.state, self._budget
        if state.steps >= budget.steps:
            return "steps"
        if state.tokens >= budget.tokens:
            return "tokens"
        return "seconds" if state.seconds >= budget.seconds else None

    # -- messages

    def _message(self, conversation: Conversation) -> Generator[AgentEvent, None, EndReason | None]:
        """Generate a message. Returns why the agent stops, None where it goes on."""
        state, budget = self._journal.state, self._budget
        started = self._clock()
        left = budget.tokens - state.tokens
        params = self._params.with_changes(max_tokens=max(1, min(self._params.max_tokens, left)))
        turn = self._assistant.start(
            conversation,
            self._principal,
            self._hooks.hooks,
            params=params,
            tools=[tool.tool for tool in self._tools.values()],
            max_rounds=1,
        )
        known = len(conversation.messages)
        bad_calls: list[BadCall] = []
        try:
            turn.begin()
            if state.steps and self._is_full(turn):
                turn.interrupt()
                return "length"
            while turn.end is None:
                generation = turn.generation
                assert generation is not None, "a turn of one round runs no tools"
                with closing(self._assistant.model.stream(generation)) as deltas:
                    for delta in deltas:
                        sent_back = turn.sent_back
                        events = turn.take(delta)
                        if turn.sent_back > sent_back:
                            bad_calls.clear()
                        for event in events:
                            bad_calls += [event] if isinstance(event, BadCall) else []
                            if not isinstance(event, TurnEnd | Called):
                                yield event
                        if turn.end is None and state.seconds + self._clock() - started >= budget.seconds:
                            turn.interrupt()
                            self._lost_seconds = self._clock() - started
                            return "seconds"
                        if turn.generation is not generation:
                            break
        except BaseException:
            turn.interrupt()
            raise
        message = conversation.messages[-1]
        for added in conversation.messages[known:-1]:
            # hooks may add what they retrieved
            self._journal.write("message", message=message_as_json(added))
        reasons = [failed(f"this call cannot be read: {call.reason}").text for call in bad_calls]
        self._journal.write(
            "message",
            message=message_as_json(message),
            prompt_tokens=turn.end.prompt_tokens,
            completion_tokens=turn.end.completion_tokens,
            seconds=self._clock() - started,
            finish=turn.end.reason,
            bad_calls=reasons,
        )
        for reason in reasons:
            conversation.add(Message.tool("", "", reason))
            yield Returned(None, ToolResult(reason, is_error=True))
        if turn.end.reason in ("length", "refused"):
            return "length" if turn.end.reason == "length" else "refused"
        return None if message.calls or bad_calls else "answer"

    def _is_full(self, turn: Turn) -> bool:
        """Whether what tools returned leaves no room for a message. A first prompt that is too long is the caller's mistake."""
        context, generation = self._assistant.model.context_length, turn.generation
        return context is not None and generation is not None and len(generation.token_ids) >= context

    # -- calls

    def _make_calls(self, conversation: Conversation) -> Generator[AgentEvent, None, EndReason | None]:
        """Make the calls of the last message that have no result yet, one after the other. Returns as `_message`."""
        context = TurnContext(conversation, self._principal, self._journal.state.steps)
        for call in list(self._journal.state.pending):
            yield Called(call)
            begun = self._journal.state.begun.get(call.id)
            result = self._recovered(begun, context) if begun is not None else self._made(call, context)
            conversation.add(Message.tool(call.id, call.name, result.text))
            yield Returned(call, result)
        return "loop" if self._detector.refusals >= _REFUSALS else None

    def _made(self, call: ToolCall, context: TurnContext) -> ToolResult:
        """The result of a call that is made now, or why it is not made."""
        tool = self._tools.get(call.name)
        if tool is None:
            return self._done(call, failed(f"there is no tool {call.name!r}; there are {', '.join(self._tools)}"), "refused")
        if not self._detector.takes(call):
            text = f"this call was made {_SAME_RESULTS} times with the same result, and is not made again; do something else"
            return self._done(call, failed(text), "loop")
        # a person may take any time here
        allowed = self._hooks.before_call(call, tool.tool, context)
        if isinstance(allowed, Deny):
            return self._done(call, failed(allowed.reason), "denied")
        note = None
        if tool.note is not None:
            try:
                note = tool.note(allowed.arguments)
            except Exception:  # arguments that do not fit; the call says so
                note = None
        self._journal.write("begin", call=call.id, name=call.name, arguments=dict(allowed.arguments), state=note)
        return self._called(allowed, tool, context)

    def _called(self, call: ToolCall, tool: AgentTool, context: TurnContext) -> ToolResult:
        started = self._clock()
        result = self._hooks.after_call(call, tool.tool.call(call.arguments), context)
        self._detector.add(call, result)
        return self._done(call, result, "called", self._clock() - started)

    def _recovered(self, begun: BegunCall, context: TurnContext) -> ToolResult:
        """The result of a call that was under way when the process ended."""
        call = begun.call
        tool = self._tools.get(call.name)
        if tool is not None and tool.recover is not None:
            result = tool.recover(call.arguments, begun.state)
            if result is not None:
                return self._done(call, self._hooks.after_call(call, result, context), "recovered")
            return self._called(call, tool, context)
        if tool is not None and tool.is_repeatable:
            return self._called(call, tool, context)
        text = (
            "the process ended during this call, and nobody knows whether it took effect; it was not repeated. Find out what "
            "the state is before you call it again"
        )
        return self._done(call, failed(text), "unknown")

    def _done(self, call: ToolCall, result: ToolResult, how: str, seconds: float = 0.0) -> ToolResult:
        self._journal.write(
            "done", call=call.id, name=call.name, text=result.text, is_error=result.is_error, how=how, seconds=seconds
        )
        return result
