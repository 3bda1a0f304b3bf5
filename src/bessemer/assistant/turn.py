"""One turn of a conversation, without input or output: rounds of messages and tool calls, and what hooks decide about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

from bessemer.assistant.conversation import AssistantConfig, Conversation, Principal
from bessemer.assistant.generation import Delta, Generation, MessageDraft
from bessemer.assistant.grammar import ThinkingTokens
from bessemer.assistant.hooks import ClientCalls, Deny, Hooks, Refuse, Retry, TurnContext, Wait
from bessemer.assistant.message_generator import MessageGenerator, MessageSettings
from bessemer.assistant.messages import (
    BadCall,
    Called,
    DraftEvent,
    EndReason,
    Event,
    Message,
    MessageEnd,
    MessagePart,
    Returned,
    RolledBack,
    TextDelta,
    ToolCall,
    TurnEnd,
)
from bessemer.assistant.tool_formats import ToolFormat
from bessemer.assistant.tools import Tool, ToolChoice, ToolResult, failed
from bessemer.core.errors import RequestError
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tokenization.tokenizer import Tokenizer

_FREE = ToolChoice()


class Turn:
    """A turn under way.

    After `begin`, whose events come first, its caller works until there is an `end`: it completes `generation` and gives the
    deltas to `take`, or calls `run_tools` where the turn `wants_tools`. Whenever `generation` is another object than before,
    the completion under way is to be stopped. `interrupt` leaves a conversation that can go on.
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
        tool_choice: ToolChoice = _FREE,
        answer_prefix: Message | None = None,
    ) -> None:
        """tools: those that the principal may not call are left out. tokenizer: None for a model behind an API. answer_prefix:
        the beginning of the first message, which no event repeats; it takes a tokenizer.

        Raises RequestError for the choice of a tool that is not offered.
        """
        self._conversation = conversation
        self._principal = principal
        self._hooks = hooks
        self._tools = {tool.name: tool for tool in tools if principal.is_in_any(tool.groups)}
        self._config = config
        self._params_of: Callable[[int], SamplingParams] = lambda _: params
        self._answer_prefix = answer_prefix
        thinking = None if tokenizer is None else ThinkingTokens(tokenizer, tool_format.thinking)
        self._settings = MessageSettings(
            self._tools, tool_format, tool_choice, thinking, config.thinking_budget, context_length
        )
        if tool_choice.name is not None and tool_choice.name not in self._tools:
            raise RequestError(f"tool_choice: there is no tool {tool_choice.name!r}")
        if tool_choice.must_call and not self._tools:
            raise RequestError("tool_choice: a tool is to be called, and none is offered")
        conversation.offer([tool.description_in_chat for tool in self._tools.values()])
        self._first_ids = list(conversation.transcript.ids)
        self._call_numbers = count(1 + sum(len(message.calls) for message in conversation.messages))
        self._round = self._attempt = 0
        self._prompt_tokens = self._completion_tokens = 0
        #: The conversation before and after this round's `before_generation` hooks.
        self._before_hooks = self._after_hooks = conversation.snapshot()
        self._message: MessageGenerator | None = None
        #: Events that wait for the hooks; whether any of this message has been given out, and its text.
        self._held: list[DraftEvent] = []
        self._has_shown = False
        self._shown_text = ""
        self._stopped_by = ""
        self._called: Sequence[ToolCall | BadCall] = ()
        self._client_calls = ClientCalls(self._tools, hooks)
        #: Messages that a hook has sent back.
        self.sent_back = 0
        self.end: TurnEnd | None = None

    @property
    def generation(self) -> Generation | None:
        """The completion that is needed next; None where none is."""
        return None if self._message is None else self._message.generation

    @property
    def wants_tools(self) -> bool:
        return bool(self._called)

    def is_run_here(self, call: ToolCall) -> bool:
        """Whether `run_tools` runs a call. False for a client's tool, and for one that is not offered."""
        tool = self._tools.get(call.name)
        return tool is not None and tool.function is not None

    @property
    def holds_back(self) -> bool:
        """Whether a hook decides how much of a growing message is given out."""
        return bool(self._hooks.holding)

    @property
    def takes_long(self) -> bool:
        """Whether `take` may wait for a hook."""
        return any(hook.takes_long for hook in self._hooks.hooks)

    def begin(self, params_of: Callable[[int], SamplingParams] | None = None) -> list[Event]:
        """Begin the first round. params_of: sampling settings, given the tokens of the prompt; None: those of the turn. Returns
        no events, or those of a refusal, after which there is nothing to complete.

        Raises RequestError where there is nothing to answer, or the chat template refuses it, and what `params_of` raises.
        """
        if params_of is not None:
            self._params_of = params_of
        if self._hooks.hooks:
            self._conversation.rewrite(lambda message: self._hooks.read(message, self._context))
        events = self._begin_round()
        self._prompt_tokens = len(self._conversation.transcript)
        return events

    def take(self, delta: Delta) -> list[Event]:
        """Take a delta of the model's output for `generation`."""
        message = self._message
        assert message is not None, "nothing is being generated"
        self._completion_tokens += len(delta.token_ids)
        events = message.take(delta)
        if not message.is_complete:
            return self._pass_on(message, events)
        return self._finish_message(message, events, delta.finish_reason)

    def run_tools(self) -> list[Event]:
        """Call the tools of the last message, one after the other, and begin the next round."""
        called, self._called = self._called, ()
        events: list[Event] = []
        waits_for_client = False
        for call in called:
            result = self._result(call)
            if result is None:
                waits_for_client = True
                continue
            known = None if isinstance(call, BadCall) else call
            self._conversation.add(Message.tool(known.id if known else "", known.name if known else "", result.text))
            events.append(Returned(known, result))
        if waits_for_client:
            return [*events, self._end("tool_calls")]
        events += self._begin_round()
        if self.end is None and self._settings.is_full(self._conversation, 1):
            self._conversation.restore(self._before_hooks)
            self._message = None
            events.append(self._end("length"))
        return events

    def interrupt(self) -> None:
        """Stop in the middle of a message. What was given out of it stays in the conversation. Where that is nothing, or a hook
        holds back, the conversation is as before this round."""
        message, self._message = self._message, None
        if message is None:
            return
        draft = message.draft
        if draft.is_empty or self._hooks.holding:
            self._conversation.restore(self._before_hooks)
        else:
            draft.finish()
            # calls without a verdict were not given out
            draft.calls = [call for call in draft.calls if not self._client_calls.awaits_verdict(call)]
            self._add_answer(draft)

    @property
    def _context(self) -> TurnContext:
        prefix = "" if self._answer_prefix is None or self._round > 1 else self._answer_prefix.text
        return TurnContext(self._conversation, self._principal, self._round, self._attempt, prefix)

    def _begin_round(self) -> list[Event]:
        """Begin a round. Returns the events of a refusal, where a hook does not admit it."""
        self._round += 1
        self._attempt = 0
        self._before_hooks = self._conversation.snapshot()
        try:
            self._hooks.before_generation(self._context)
            self._after_hooks = self._conversation.snapshot()
            refusal = self._hooks.admit(self._context)
            if refusal is None:
                self._begin_message()
                return []
            self._message = None
            return self._refuse_with(refusal.text)
        except BaseException:
            self._conversation.restore(self._before_hooks)
            raise

    def _begin_message(self) -> None:
        message = MessageGenerator(
            self._conversation,
            self._settings,
            self._params_of,
            lambda: f"call{next(self._call_numbers):05d}",
            round_number=self._round,
            attempt=self._attempt,
            answer_prefix=self._answer_prefix if self._round == 1 else None,
        )
        # the first message decides for all
        self._params_of = lambda _: message.params
        self._message = message
        self._held, self._has_shown, self._shown_text = [], False, ""

    # -- what is given out

    def _pass_on(self, message: MessageGenerator, events: Sequence[DraftEvent]) -> list[Event]:
        """Give out what the hooks let pass. A complete message is checked by all hooks, a growing one by those that hold
        back."""
        self._held += events
        if message.is_complete or (events and self._hooks.holding):
            decision = self._hooks.check(message.draft, self._context, is_final=message.is_complete)
            if isinstance(decision, Retry | Refuse):
                return self._send_back(decision)
            if isinstance(decision, Wait):
                return []
        elif self._hooks.holding:
            return []
        return self._release()

    def _release(self) -> list[Event]:
        """Give out the held events, up to a call that awaits the hooks' verdict."""
        waits = (isinstance(event, Called) and self._client_calls.awaits_verdict(event.call) for event in self._held)
        end = next((index for index, waiting in enumerate(waits) if waiting), len(self._held))
        released, self._held = self._held[:end], self._held[end:]
        self._has_shown = self._has_shown or bool(released)
        self._shown_text += "".join(event.text for event in released if isinstance(event, TextDelta))
        return list(released)

    def _send_back(self, decision: Retry | Refuse) -> list[Event]:
        """Take the message back, and generate it again or refuse."""
        self.sent_back += 1
        keeps_shown = isinstance(decision, Refuse) and decision.keeps_shown
        events: list[Event] = [RolledBack(decision.reason)] if self._has_shown and not keeps_shown else []
        self._held, self._message = [], None
        self._conversation.restore(self._after_hooks)
        if isinstance(decision, Retry) and self._attempt < self._config.max_retries:
            self._attempt += 1
            if decision.instruction:
                separator = "\n\n" if self._conversation.messages[-1].text else ""
                self._conversation.add_part(MessagePart(separator + decision.instruction, "system"))
            self._begin_message()
            return events
        text = decision.text if isinstance(decision, Refuse) else self._config.refusal
        return [*events, *self._refuse_with(text, self._shown_text if keeps_shown else "")]

    def _refuse_with(self, text: str, shown: str = "") -> list[Event]:
        """Answer with a text that no model wrote, and end the turn. shown: the answer's text that was given out before."""
        if (thinking := self._settings.thinking) is not None:
            is_open, _ = self._settings.open_message(self._conversation)
            tags = [*(thinking.closing if is_open else ()), *thinking.answer]
            self._conversation.transcript.append([*tags, *thinking.tokenizer.encode(shown + text, add_bos=False)])
        message = Message.assistant(shown + text)
        self._conversation.add_answer(message)
        return [*([TextDelta(text)] if text else []), MessageEnd(message), self._end("refused")]

    def _finish_message(
        self, message: MessageGenerator, events: Sequence[DraftEvent], finish_reason: str | None
    ) -> list[Event]:
        passed, draft = self._pass_on(message, events), message.draft
        if self._message is not message:
            return passed
        self._stopped_by = draft.stopped_by
        self._message = None
        answer = self._decide_about_calls(draft, self._add_answer(draft))
        passed += [*self._release(), MessageEnd(answer)]
        if finish_reason == "length":
            return [*passed, self._end("length")]
        if not draft.calls:
            return [*passed, self._end("answer")]
        if self._round >= self._config.max_rounds and not any(map(self._client_calls.waits_for_client, draft.calls)):
            return [*passed, self._end("rounds")]
        self._called = draft.calls
        return passed

    def _add_answer(self, draft: MessageDraft) -> Message:
        message = draft.message(is_derived=self._conversation.is_tainted)
        self._conversation.add_answer(message)
        return message

    # -- tools

    def _decide_about_calls(self, draft: MessageDraft, message: Message) -> Message:
        """Ask the hooks about client-side calls before these are given out. The message keeps the calls as the hooks changed
        them; denied ones are not given out."""
        calls = self._client_calls
        try:
            if not calls.decide(draft.calls, self._context):
                return message
        except BaseException:
            self._conversation.restore(self._before_hooks)
            raise
        draft.calls = [call if isinstance(call, BadCall) else calls.as_allowed(call) for call in draft.calls]
        self._held = calls.decided(self._held)
        message = replace(message, calls=tuple(map(calls.as_allowed, message.calls)))
        self._conversation.change_answer(message)
        return message

    def _result(self, call: ToolCall | BadCall) -> ToolResult | None:
        """The result of a call for the assistant; None for a call that the client runs."""
        if isinstance(call, BadCall):
            return failed(f"this call cannot be read: {call.reason}")
        tool = self._tools.get(call.name)
        if tool is None:
            return failed(f"there is no tool {call.name!r}; there are {', '.join(self._tools)}")
        if self._client_calls.waits_for_client(call):
            return None
        allowed = self._client_calls.verdict(call) or self._hooks.before_call(call, tool, self._context)
        if isinstance(allowed, Deny):
            return failed(allowed.reason)
        return self._hooks.after_call(allowed, tool.call(allowed.arguments), self._context)

    def _end(self, reason: EndReason) -> TurnEnd:
        ids = self._conversation.transcript.ids
        assert ids[: len(self._first_ids)] == self._first_ids, "a turn extends the tokens of those before"
        self.end = TurnEnd(reason, self._prompt_tokens, self._completion_tokens, self._stopped_by)
        return self.end
