"""One turn of a conversation, without input or output: what it needs next, and the events of what came."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from bessemer.assistant.config import AssistantConfig
from bessemer.assistant.conversation import Conversation
from bessemer.assistant.draft import Draft, MessageText
from bessemer.assistant.events import (
    BadCall,
    DraftEvent,
    EndReason,
    Event,
    MessageEnd,
    Returned,
    RolledBack,
    TextDelta,
    TurnEnd,
)
from bessemer.assistant.generation import Delta, Generation
from bessemer.assistant.hooks import Deny, Hooks, Pass, Refuse, Retry, TurnContext, Wait
from bessemer.assistant.messages import Message, Part, ToolCall
from bessemer.assistant.parser import OutputParser
from bessemer.assistant.principal import Principal
from bessemer.assistant.thinking import ThinkingTokens
from bessemer.assistant.tool_formats import ToolFormat
from bessemer.assistant.tools import Tool, ToolResult, failed
from bessemer.core.seeds import derive_seed
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tokenization.tokenizer import Tokenizer


class Turn:
    """A turn under way.

    After `begin`, its caller does what it needs until there is an `end`: completes `generation` and gives `take` the deltas, or
    calls `run_tools` where it `wants_tools`. When `generation` is another one than before, the one under way is to be stopped.
    `interrupt` leaves the conversation so that it can go on.
    """

    def __init__(
        self,
        conversation: Conversation,
        principal: Principal,
        hooks: Hooks,
        *,
        tools: Sequence[Tool],
        tool_format: ToolFormat,
        params: SamplingParams,
        config: AssistantConfig,
        tokenizer: Tokenizer | None,
        context_length: int | None,
    ) -> None:
        """tools: those that the principal may not call are not offered. tokenizer: None of a model that is given messages."""
        self._conversation = conversation
        self._principal = principal
        self._hooks = hooks
        self._tools = {tool.name: tool for tool in tools if principal.is_in_any(tool.groups)}
        self._format = tool_format
        self._params = params
        self._config = config
        self._context_length = context_length
        #: With the tokenizer; None of a model that is given messages.
        self._thinking = None if tokenizer is None else ThinkingTokens(tokenizer)
        conversation.offer([tool.description_in_chat for tool in self._tools.values()])
        self._first_ids = list(conversation.transcript.ids)
        self._call_numbers = count(1 + sum(len(message.calls) for message in conversation.messages))
        self._round = self._attempt = self._requests = 0
        self._prompt_tokens = self._completion_tokens = 0
        #: Before the hooks of this round, and after.
        self._before = self._ready = conversation.snapshot()
        self._draft: Draft | None = None
        self._held: list[DraftEvent] = []
        self._has_shown = False
        #: Whether a request ends at the thinking budget.
        self._is_capped = False
        self._called: Sequence[ToolCall | BadCall] = ()
        self.generation: Generation | None = None
        self.end: TurnEnd | None = None

    @property
    def wants_tools(self) -> bool:
        """Whether `run_tools` is next."""
        return bool(self._called)

    def begin(self) -> None:
        """Begin the first round. Raises RequestError where there is nothing to answer, or the chat template refuses it."""
        self._begin_round()
        self._prompt_tokens = len(self._conversation.transcript)

    def take(self, delta: Delta) -> list[Event]:
        """Take what the model gave for `generation`."""
        draft = self._draft
        assert draft is not None and self.generation is not None, "nothing is being generated"
        self._conversation.transcript.append_own(delta.token_ids, delta.log_probs, delta.weight_version)
        self._completion_tokens += len(delta.token_ids)
        events = draft.take(delta)
        if delta.finish_reason is None:
            return self._pass_on(draft, events)
        if delta.finish_reason == "length" and self._is_cut_by_budget(draft):
            return self._pass_on(draft, [*events, *self._after_budget(draft)])
        return self._finish_message(draft, [*events, *draft.finish()], delta.finish_reason)

    def run_tools(self) -> list[Event]:
        """Call the tools of the last message, one after the other, and begin the next round."""
        called, self._called = self._called, ()
        events: list[Event] = []
        waits = False
        for call in called:
            result = self._result(call)
            if result is None:
                waits = True
                continue
            known = None if isinstance(call, BadCall) else call
            self._conversation.add(Message.tool(known.id if known else "", known.name if known else "", result.text))
            events.append(Returned(known, result))
        if waits:
            return [*events, self._end("tool_calls")]
        self._begin_round()
        if self._is_full(1):
            self._conversation.restore(self._before)
            self._draft = self.generation = None
            events.append(self._end("length"))
        return events

    def interrupt(self) -> None:
        """Stop in the middle. What was given out of this message stays in the conversation. Where that is nothing, or a
        hook holds back, the conversation is as before this round."""
        draft, self._draft, self.generation = self._draft, None, None
        if draft is None:
            return
        if draft.is_empty or self._hooks.holding:
            self._conversation.restore(self._before)
        else:
            draft.finish()
            self._add_answer(draft)

    # -- a round

    @property
    def _context(self) -> TurnContext:
        return TurnContext(self._conversation, self._principal, self._round, self._attempt)

    def _begin_round(self) -> None:
        self._round += 1
        self._attempt = 0
        self._before = self._conversation.snapshot()
        try:
            self._hooks.before_generation(self._context)
            self._ready = self._conversation.snapshot()
            self._begin_message()
        except BaseException:
            self._conversation.restore(self._before)
            raise

    def _begin_message(self) -> None:
        # a grammar leaves no place for thinking
        self._is_capped = self._config.thinking_budget is not None and self._params.grammar is None
        is_thinking = self._encode()
        tools_are_read = self._format if self._tools else None
        tags = (self._format.opening, self._format.closing or "") if self._tools else ()
        text = None
        if self._thinking is not None:
            text = MessageText(self._thinking.tokenizer, self._params, {*tags, *self._thinking.tags})
        parser = OutputParser(tools_are_read, in_thinking=is_thinking)
        self._draft = Draft(parser, text, lambda: f"call{next(self._call_numbers):05d}")
        self._held, self._has_shown, self._requests = [], False, 0
        self._ask(self._draft)

    def _encode(self) -> bool:
        """Extend the transcript up to where the assistant speaks. Returns whether thinking is open there."""
        if self._thinking is None:
            return False
        transcript = self._conversation.transcript
        self._conversation.encode(self._thinking.tokenizer)
        is_open = self._thinking.is_open(transcript.ids)
        if self._config.thinking_budget == 0 and (is_open or self._thinking.in_template):
            transcript.append(self._thinking.closing if is_open else self._thinking.none)
            self._is_capped = False
            return False
        return is_open

    def _ask(self, draft: Draft) -> None:
        """Need the next completion of this message."""
        params, budget = self._params, self._config.thinking_budget
        most = params.max_tokens - draft.generated
        if self._is_capped and budget is not None:
            most = min(most, max(budget - draft.generated, 1))
        changes = {"max_tokens": most, "min_tokens": min(max(params.min_tokens - draft.generated, 0), most)}
        place = (self._round, self._attempt, self._requests)
        if params.seed is not None and place != (1, 0, 0):
            changes["seed"] = derive_seed(params.seed, *place)
        self._requests += 1
        self.generation = Generation(
            tuple(self._conversation.transcript.ids),
            () if self._thinking is not None else self._conversation.template_inputs(),
            self._conversation.offered,
            params.with_changes(**changes),
        )

    def _is_full(self, tokens: int) -> bool:
        """Whether the context does not hold as many more tokens."""
        return self._context_length is not None and len(self._conversation.transcript) + tokens > self._context_length

    # -- the thinking budget

    def _is_cut_by_budget(self, draft: Draft) -> bool:
        """Whether a completion that came to its most tokens did so because of the budget, and can go on."""
        closing = self._thinking.closing if self._thinking is not None and draft.parser.in_thinking else ()
        return self._is_capped and draft.generated < self._params.max_tokens and not self._is_full(len(closing) + 1)

    def _after_budget(self, draft: Draft) -> list[DraftEvent]:
        """Close the thinking where it is open, and go on; where only half an opening tag is there, token by token."""
        events: list[DraftEvent] = []
        if not draft.parser.is_undecided:
            self._is_capped = False
            if draft.parser.in_thinking and self._thinking is not None:
                events = draft.close_thinking()
                self._conversation.transcript.append(self._thinking.closing)
        self._ask(draft)
        return events

    # -- what is given out

    def _pass_on(self, draft: Draft, events: Sequence[DraftEvent], *, is_final: bool = False) -> list[Event]:
        """Give out what the hooks let pass."""
        self._held += events
        if is_final or (events and self._hooks.holding):
            match self._hooks.check(draft, self._context, is_final=is_final):
                case Wait():
                    return []
                case Retry() | Refuse() as decision:
                    return self._send_back(decision)
                case Pass():
                    pass
        elif self._hooks.holding:
            return []
        released, self._held = self._held, []
        self._has_shown = self._has_shown or bool(released)
        return list(released)

    def _send_back(self, decision: Retry | Refuse) -> list[Event]:
        """Take the message back, and generate it again or refuse."""
        events: list[Event] = [RolledBack(decision.reason)] if self._has_shown else []
        self._held, self._draft, self.generation = [], None, None
        self._conversation.restore(self._ready)
        if isinstance(decision, Retry) and self._attempt < self._config.max_retries:
            self._attempt += 1
            if decision.instruction:
                self._conversation.add_part(Part(decision.instruction, "system"))
            self._begin_message()
            return events
        text = decision.text if isinstance(decision, Refuse) else self._config.refusal
        if self._thinking is not None:
            closing = self._thinking.closing if self._encode() else []
            self._conversation.transcript.append([*closing, *self._thinking.tokenizer.encode(text, add_bos=False)])
        message = Message.assistant(text)
        self._conversation.add_answer(message)
        return [*events, TextDelta(text), MessageEnd(message), self._end("refused")]

    def _finish_message(self, draft: Draft, events: Sequence[DraftEvent], finish_reason: str) -> list[Event]:
        passed = self._pass_on(draft, events, is_final=True)
        if self._draft is not draft:
            return passed
        message = self._add_answer(draft)
        self._draft = self.generation = None
        passed.append(MessageEnd(message))
        if finish_reason == "length":
            return [*passed, self._end("length")]
        if not draft.calls:
            return [*passed, self._end("answer")]
        if self._round >= self._config.max_rounds and not any(self._is_callers(call) for call in draft.calls):
            return [*passed, self._end("rounds")]
        self._called = draft.calls
        return passed

    def _add_answer(self, draft: Draft) -> Message:
        message = draft.message(is_derived=self._conversation.is_tainted)
        self._conversation.add_answer(message)
        return message

    # -- tools

    def _is_callers(self, call: ToolCall | BadCall) -> bool:
        """Whether the caller of the turn runs it."""
        tool = None if isinstance(call, BadCall) else self._tools.get(call.name)
        return tool is not None and tool.function is None

    def _result(self, call: ToolCall | BadCall) -> ToolResult | None:
        """What the assistant is told of a call; None where the caller of the turn runs it."""
        if isinstance(call, BadCall):
            return failed(f"this call cannot be read: {call.reason}")
        tool = self._tools.get(call.name)
        if tool is None:
            return failed(f"there is no tool {call.name!r}; there are {', '.join(self._tools)}")
        allowed = self._hooks.before_call(call, tool, self._context)
        if isinstance(allowed, Deny):
            return failed(allowed.reason)
        if tool.function is None:
            return None
        return self._hooks.after_call(allowed, tool.call(allowed.arguments), self._context)

    def _end(self, reason: EndReason) -> TurnEnd:
        ids = self._conversation.transcript.ids
        assert ids[: len(self._first_ids)] == self._first_ids, "a turn extends the tokens of those before"
        self.end = TurnEnd(reason, self._prompt_tokens, self._completion_tokens)
        return self.end
