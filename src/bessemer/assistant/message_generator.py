"""Generation of one message: completions of a model, its thinking within a budget, and the grammar of what follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bessemer.assistant.conversation import Conversation
from bessemer.assistant.generation import Delta, Generation, MessageDraft, MessageText
from bessemer.assistant.grammar import MessageForm, OfferedTool, ThinkingTokens
from bessemer.assistant.messages import DraftEvent, Message
from bessemer.assistant.tool_formats import ToolFormat
from bessemer.assistant.tools import Tool, ToolChoice
from bessemer.core.errors import RequestError
from bessemer.core.hashing import derive_seed
from bessemer.inference.sampling.params import GRAMMARS, SamplingParams


@dataclass(frozen=True)
class MessageSettings:
    """What all messages of a turn share. thinking, context_length: None for a model behind an API."""

    tools: Mapping[str, Tool]
    tool_format: ToolFormat
    tool_choice: ToolChoice
    thinking: ThinkingTokens | None
    thinking_budget: int | None
    context_length: int | None

    def open_message(self, conversation: Conversation) -> tuple[bool, bool]:
        """Extend the transcript to where the assistant speaks. Returns whether thinking is open there, and whether a budget of
        0 has closed it. Raises as `Conversation.encode`."""
        if self.thinking is None:
            return False, False
        transcript = conversation.transcript
        conversation.encode(self.thinking.tokenizer)
        is_open = self.thinking.is_open(transcript.ids)
        if self.thinking_budget == 0 and (is_open or self.thinking.in_template):
            transcript.append(self.thinking.closing if is_open else self.thinking.none)
            return False, True
        return is_open, False

    def is_full(self, conversation: Conversation, tokens: int) -> bool:
        """Whether the context has no room for so many more tokens."""
        return self.context_length is not None and len(conversation.transcript) + tokens > self.context_length


class MessageGenerator:
    """One attempt at a message. `draft` grows by the deltas of `generation`, which is replaced where another completion is
    needed: behind thinking that the budget cut, or that was generated without the grammar of the answer."""

    def __init__(
        self,
        conversation: Conversation,
        settings: MessageSettings,
        params_of: Callable[[int], SamplingParams],
        next_call_id: Callable[[], str],
        *,
        round_number: int,
        attempt: int,
        answer_prefix: Message | None = None,
    ) -> None:
        """params_of: sampling settings, given the tokens of the prompt. answer_prefix: what the message begins with.

        Raises RequestError where there is nothing to answer, or the chat template or the format refuses it.
        """
        self._conversation = conversation
        self._settings = settings
        self._round = round_number
        self._attempt = attempt
        self._requests = 0
        self.is_complete = False
        thinking, budget, tool_format = settings.thinking, settings.thinking_budget, settings.tool_format
        transcript = conversation.transcript
        is_thinking, is_closed = settings.open_message(conversation)
        if answer_prefix is not None:
            self._write_prefix(answer_prefix, is_thinking)
            is_thinking, is_closed = False, True
        self.params = params_of(len(transcript))
        is_free = self._form().is_free
        #: Whether the thinking is a completion of its own, so that a grammar can begin behind it, and whether that is done.
        self._thinks_apart, self._has_thought = False, answer_prefix is not None
        text = None
        if thinking is not None:
            tags = tool_format.tags(with_calls=bool(settings.tools))
            text = MessageText(thinking.tokenizer, self.params, tags, continues=answer_prefix is not None)
            if budget and not is_free and not is_closed and (is_thinking or thinking.in_template):
                self._thinks_apart = True
                if not is_thinking:
                    transcript.append(thinking.opening)
                    is_thinking = True
        schemas = {name: tool.parameters for name, tool in settings.tools.items()} if settings.tools else None
        parser = tool_format.parser(schemas, in_thinking=is_thinking, is_tagged=not is_free)
        if thinking is not None and is_closed and (is_free or answer_prefix is not None):
            if answer_prefix is None:
                transcript.append(thinking.answer)
            parser.feed(thinking.tags.answer)
        #: Whether completions end at the thinking budget, and behind it where thinking may open again.
        self._is_capped = budget is not None and is_free and (parser.may_think_again or not is_closed)
        self.draft = MessageDraft(parser, text, next_call_id)
        if answer_prefix is not None:
            if not is_free and thinking is not None and thinking.tags.answer:
                raise RequestError("the assistant's message has begun, and cannot be held to a grammar in this model's format")
            # hooks see the whole message
            self.draft.thinking, self.draft.text = answer_prefix.thinking, answer_prefix.text
        self.generation = self._next_generation()

    def take(self, delta: Delta) -> list[DraftEvent]:
        """Add what the model gave for `generation`. Sets `is_complete` at the message's end."""
        draft = self.draft
        self._conversation.transcript.append_own(delta.token_ids, delta.log_probs, delta.weight_version)
        events = draft.take(delta)
        if delta.finish_reason is None:
            return events
        if delta.finish_reason in ("stop", "length") and not self._is_stopped(delta) and self._has_room:
            if self._thinks_apart:
                return [*events, *self._end_thinking()]
            if self._is_cut_by_budget(delta):
                return [*events, *self._end_budget()]
        self.is_complete = True
        return [*events, *draft.finish()]

    def _write_prefix(self, prefix: Message, is_open: bool) -> None:
        """Write the message's beginning: its thinking, where the template knows any, and its text. is_open: whether the
        template has opened the thinking."""
        thinking = self._settings.thinking
        assert thinking is not None, "a model behind an API begins its own messages"
        ids: list[int] = []
        if prefix.thinking and (is_open or thinking.in_template):
            opening = [] if is_open else thinking.opening
            ids = [*opening, *thinking.tokenizer.encode(prefix.thinking, add_bos=False), *thinking.closing]
        elif is_open:
            ids = thinking.closing
        text = thinking.tokenizer.encode(prefix.text, add_bos=False)
        self._conversation.transcript.append([*ids, *thinking.answer, *text])

    def _form(self) -> MessageForm:
        """What the message must look like, apart from its thinking."""
        settings, choice = self._settings, self._settings.tool_choice
        tools = [tool for tool in settings.tools.values() if choice.name is None or tool.name == choice.name]
        return MessageForm(
            tools=[OfferedTool(tool.name, tool.parameters, tool.is_strict) for tool in tools],
            # in the first round only: the turn would never end
            must_call=choice.must_call and self._round == 1,
            in_parallel=choice.in_parallel,
            answer=self.params.grammar,
        )

    def _grammar(self) -> dict[str, Any]:
        """Settings that hold the next completion to the message's form."""
        settings, parser, form = self._settings, self.draft.parser, self._form()
        thinking = settings.thinking
        if thinking is None or form.is_free:
            return {}
        if self._thinks_apart:
            return dict.fromkeys(GRAMMARS)
        may_think = parser.is_undecided and thinking.in_template and settings.thinking_budget != 0
        if parser.in_thinking:
            form = replace(form, thinking="open")
        elif may_think and not self._has_thought:
            form = replace(form, thinking="may")
        if form.thinking == "never" and not form.tools and not thinking.tags.answer:
            return {}
        try:
            grammar = settings.tool_format.grammar(form, thinking.tokenizer.control_id)
        except ValueError as error:
            raise RequestError(f"tool_choice: {error}") from None
        return dict.fromkeys(GRAMMARS) | {"ebnf": grammar}

    def _next_generation(self) -> Generation:
        """The next completion of this message."""
        params, budget, thinking, draft = self.params, self._settings.thinking_budget, self._settings.thinking, self.draft
        max_tokens = params.max_tokens - draft.generated
        ends_at_tag = self._thinks_apart
        if (self._is_capped or self._thinks_apart) and budget is not None:
            if draft.generated >= budget and draft.parser.may_think_again:
                ends_at_tag = True
            else:
                max_tokens = min(max_tokens, max(budget - draft.generated, 1))
        changes: dict[str, Any] = {
            "max_tokens": max_tokens,
            "min_tokens": min(max(params.min_tokens - draft.generated, 0), max_tokens),
            **self._grammar(),
        }
        if ends_at_tag and thinking is not None:
            token = thinking.closing_token
            if token is not None:
                changes["stop_token_ids"] = [*params.stop_token_ids, token]
            elif draft.generated >= params.min_tokens:
                changes["stop"] = [*params.stop, thinking.tags.closing]
            else:
                # before min_tokens the tag may come, but nothing that ends the message
                changes |= {"min_tokens": 0, "stop": [thinking.tags.closing], "stop_token_ids": []}
        place = (self._round, self._attempt, self._requests)
        if params.seed is not None and place != (1, 0, 0):
            changes["seed"] = derive_seed(params.seed, *place)
        self._requests += 1
        return Generation(
            tuple(self._conversation.transcript.ids),
            () if thinking is not None else self._conversation.template_inputs(),
            self._conversation.offered,
            params.with_changes(**changes),
        )

    def _is_stopped(self, delta: Delta) -> bool:
        """Whether a stop string or stop token of the caller ended the message."""
        thinking, stopped_by = self._settings.thinking, self.draft.stopped_by
        if delta.finish_reason != "stop" or thinking is None:
            return bool(stopped_by)
        last = self._conversation.transcript.ids[-1]
        return bool(stopped_by) or (last in self.params.stop_token_ids and last not in thinking.tokenizer.eos_ids)

    def _is_cut_by_budget(self, delta: Delta) -> bool:
        """Whether the budget ended a completion: by its tokens, or at a tag behind which thinking may open again."""
        if self._settings.thinking is None or not self._is_capped:
            return False
        is_ended = self._conversation.transcript.ids[-1] in self._settings.thinking.tokenizer.eos_ids
        return delta.finish_reason == "length" or (self.draft.parser.is_undecided and not is_ended)

    @property
    def _has_room(self) -> bool:
        """Whether more tokens may come, after those that close the thinking."""
        thinking = self._settings.thinking
        closing: Sequence[int] = ()
        if thinking is not None and (self._thinks_apart or self.draft.parser.in_thinking):
            closing = [*thinking.closing, *thinking.answer]
        is_full = self._settings.is_full(self._conversation, len(closing) + 1)
        return self.draft.generated < self.params.max_tokens and not is_full

    def _end_thinking(self) -> list[DraftEvent]:
        """End the completion of the thinking, by its closing tag or the budget, and go on with the answer."""
        thinking, transcript = self._settings.thinking, self._conversation.transcript
        assert thinking is not None
        self._thinks_apart, self._has_thought = False, True
        events = self.draft.close_thinking()
        if transcript.ids[-1] in thinking.tokenizer.eos_ids:
            # the message does not end here
            transcript.roll_back(len(transcript) - 1)
        transcript.append(thinking.closing if self.draft.is_thinking_cut else thinking.after)
        self.generation = self._next_generation()
        return events

    def _end_budget(self) -> list[DraftEvent]:
        """Close the thinking if it is open, and go on. Where half an opening tag has come, the next tokens decide."""
        draft, thinking = self.draft, self._settings.thinking
        events: list[DraftEvent] = []
        if draft.parser.in_thinking and thinking is not None:
            events = draft.close_thinking(thinking.tags.answer)
            self._conversation.transcript.append([*thinking.closing, *thinking.answer])
        self._is_capped = draft.parser.is_undecided or draft.parser.may_think_again
        self.generation = self._next_generation()
        return events
