"""Responses to chat completions: whole, or event by event."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bessemer.assistant.events import BadCall, Called, EndReason, Event, RolledBack, TextDelta, ThinkingDelta, TurnEnd
from bessemer.assistant.messages import ToolCall
from bessemer.inference.sampling.sampler import Sampled
from bessemer.serving.bodies import ApiError
from bessemer.serving.log_probs import chat_log_probs
from bessemer.serving.turns import ChoiceEvents, Turns
from bessemer.tokenization.tokenizer import Tokenizer

#: How a turn ended, as OpenAI says it.
_FINISH: dict[EndReason, str] = {
    "answer": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "rounds": "tool_calls",
    "refused": "content_filter",
}


@dataclass
class _Choice:
    """An answer so far."""

    text: str = ""
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    #: Ids that the client has not been told.
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    has_begun: bool = False


class ChatReply:
    """The response to a chat request: one choice for each answer, and the tokens that they took."""

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        turns: Turns,
        *,
        n: int,
        log_probs: bool,
        shows_thinking: bool,
        shows_ids: bool = False,
    ) -> None:
        """log_probs: whether they are told. shows_thinking: whether the client is told what the model thought. shows_ids:
        whether it is told the ids of all tokens."""
        self._model = model
        self._tokenizer = tokenizer
        self._turns = turns
        self.tells_log_probs = log_probs
        self._shows_thinking = shows_thinking
        self._shows_ids = shows_ids
        self._prompt_is_told = not shows_ids
        self._choices = [_Choice() for _ in range(n)]
        self._created = int(time.time())
        self._identity = uuid.uuid4().hex

    def whole(self, told: Iterable[ChoiceEvents]) -> dict[str, Any]:
        """The response of a request that does not stream."""
        for choice, events, sampled, token_ids in told:
            self._choices[choice].sampled += sampled
            self._choices[choice].token_ids += token_ids
            for _ in self._deltas(self._choices[choice], events):
                pass
        choices = []
        for index, one in enumerate(self._choices):
            message: dict[str, Any] = {"role": "assistant", "content": one.text or (None if one.calls else "")}
            if one.thinking and self._shows_thinking:
                message |= _thought(one.thinking)
            if one.calls:
                message["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call)}}
                    for call in one.calls
                ]
            ids = {"token_ids": one.token_ids} if self._shows_ids else {}
            choices.append({"index": index, "message": message, **self._ending(one, one.sampled), **ids})
        prompt = {"prompt_token_ids": self._turns.prompt_ids} if self._shows_ids else {}
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage(), **prompt}

    def events(self, told: Iterable[ChoiceEvents]) -> Iterator[dict[str, Any]]:
        """Events of a stream for what one or more steps made.

        A choice's role comes with its first token, as in vLLM: clients take the first event for it.
        """
        for choice, events, sampled, token_ids in _by_choice(told):
            one = self._choices[choice]
            one.token_ids += token_ids
            if not one.has_begun:
                one.has_begun = True
                yield self._event(choice, {"role": "assistant", "content": ""})
            told_of = sampled if self.tells_log_probs else ()
            for delta in self._deltas(one, events):
                yield self._event(choice, delta, chat_log_probs(self._tokenizer, told_of) if told_of else None)
                told_of = ()
            if told_of:
                yield self._event(choice, {"content": ""}, chat_log_probs(self._tokenizer, told_of))
            if one.finish_reason is not None:
                yield self._event(choice, {}, None, one.finish_reason)

    def usage_event(self) -> dict[str, Any]:
        """The event before the end for a client that asked for its usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}

    def _deltas(self, one: _Choice, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
        """What a client is told of events, and the choice with them. Raises ApiError where what it was told is withdrawn."""
        for event in events:
            match event:
                case ThinkingDelta(text):
                    one.thinking += text
                    if self._shows_thinking:
                        yield _thought(text)
                case TextDelta(text) | BadCall(text):
                    one.text += text
                    yield {"content": text}
                case Called(call):
                    index = len(one.calls)
                    one.calls.append(call)
                    named = {"name": call.name, "arguments": ""}
                    yield {"tool_calls": [{"index": index, "id": call.id, "type": "function", "function": named}]}
                    yield {"tool_calls": [{"index": index, "function": {"arguments": _arguments(call)}}]}
                case RolledBack(reason):
                    raise ApiError(f"the answer was withdrawn: {reason}", status=500, kind="server_error", code="withdrawn")
                case TurnEnd(reason):
                    one.finish_reason = "stop" if reason == "rounds" and not one.calls else _FINISH[reason]
                case _:
                    pass

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self._identity}", "object": kind, "created": self._created, "model": self._model}

    def _usage(self) -> dict[str, Any]:
        """Tokens as the model sees them, end tokens included; of a prompt once, however many choices."""
        prompt, made = self._turns.prompt_tokens, self._turns.completion_tokens
        thought = sum(len(self._tokenizer.encode(one.thinking, add_bos=False)) for one in self._choices if one.thinking)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": self._turns.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }

    def _ending(self, one: _Choice, sampled: Sequence[Sampled]) -> dict[str, Any]:
        log_probs = chat_log_probs(self._tokenizer, sampled) if self.tells_log_probs else None
        return {"logprobs": log_probs, "finish_reason": one.finish_reason}

    def _event(
        self, choice: int, delta: dict[str, Any], log_probs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        one: dict[str, Any] = {"index": choice, "delta": delta, "logprobs": log_probs, "finish_reason": finish_reason}
        event = {**self._head("chat.completion.chunk"), "choices": [one]}
        if self._shows_ids:
            one["token_ids"], self._choices[choice].token_ids = self._choices[choice].token_ids, []
        if not self._prompt_is_told:
            self._prompt_is_told = True
            event["prompt_token_ids"] = self._turns.prompt_ids
        return event


def _by_choice(told: Iterable[ChoiceEvents]) -> Iterator[tuple[int, list[Event], list[Sampled], list[int]]]:
    """The news of several steps, one entry for each choice; texts that follow each other are one."""
    of_choice: dict[int, tuple[list[Event], list[Sampled], list[int]]] = {}
    for choice, events, sampled, token_ids in told:
        mine, tokens, ids = of_choice.setdefault(choice, ([], [], []))
        tokens += sampled
        ids += token_ids
        for event in events:
            last = mine[-1] if mine else None
            if isinstance(event, TextDelta | ThinkingDelta) and type(last) is type(event):
                mine[-1] = type(event)(last.text + event.text)
            else:
                mine.append(event)
    for choice, found in of_choice.items():
        yield choice, *found


def _thought(text: str) -> dict[str, str]:
    """Thinking as vLLM spells it, and as DeepSeek and llama.cpp do."""
    return {"reasoning": text, "reasoning_content": text}


def _arguments(call: ToolCall) -> str:
    return json.dumps(call.arguments, ensure_ascii=False)
