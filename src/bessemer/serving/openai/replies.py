"""Responses to chat and plain completions, whole or event by event, and their log-probabilities in OpenAI's two forms."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bessemer.assistant.messages import (
    BadCall,
    Called,
    EndReason,
    Event,
    RolledBack,
    TextDelta,
    ThinkingDelta,
    ToolCall,
    TurnEnd,
)
from bessemer.inference.request import Chunk, Completion
from bessemer.inference.sampling.sampler import Sampled
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.worker import ChoiceEvents, Turns
from bessemer.tokenization.prompts import StreamingDecoder
from bessemer.tokenization.tokenizer import Tokenizer

#: JSON has no infinity: what is at or below has this log-probability, as in other servers.
_LOWEST = -9999.0


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""A token as clients are shown it: its text, `bytes:\xe6` where it is a part of a character (as OpenAI writes it), and
    `token_id:7` where the model has more tokens than the tokenizer."""
    content = _token_bytes(tokenizer, token)
    if content is None:
        return f"token_id:{token}"
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def chat_log_probs(tokenizer: Tokenizer, sampled: Sequence[Sampled]) -> dict[str, Any]:
    """The `logprobs` of a chat choice, or of one event of its stream."""
    return {"content": [_chat_token(tokenizer, one) for one in sampled], "refusal": None}


class CompletionLogProbs:
    """The `logprobs` of a plain completion's choice, in one part or, in a stream, in several."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamingDecoder(tokenizer)
        self._length = 0

    def of_prompt(self, prompt: Sequence[int], known: Sequence[Sampled]) -> dict[str, list[Any]]:
        """Of a prompt that is shown: nothing comes before its first token, which so has no log-probability."""
        assert len(known) == len(prompt) - 1, "every token of the prompt but the first has its log-probability"
        first: dict[str, list[Any]] = {
            "tokens": [token_text(self._tokenizer, prompt[0])],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [self._offset(prompt[0])],
        }
        return joined(first, self.of(known))

    def of(self, sampled: Sequence[Sampled]) -> dict[str, list[Any]]:
        """Of tokens that follow those before. The likeliest are given with the token itself among them."""
        part: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, found in sampled:
            assert found is not None, "log-probabilities were asked for"
            text = token_text(self._tokenizer, token)
            top: dict[str, float] = {}
            for id, value in found.top:
                top.setdefault(token_text(self._tokenizer, id), _finite(value))
            top.setdefault(text, _finite(found.token))
            part["tokens"].append(text)
            part["token_logprobs"].append(_finite(found.token))
            part["top_logprobs"].append(top)
            part["text_offset"].append(self._offset(token))
        return part

    def _offset(self, token: int) -> int:
        """Where the token's text begins, in characters of the text so far."""
        offset = self._length
        if token < self._tokenizer.vocab_size:
            self._length += len(self._decoder.feed([token]))
        return offset


def joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Two parts of a plain completion's log-probabilities, one after the other."""
    return {name: first[name] + second[name] for name in first}


def _chat_token(tokenizer: Tokenizer, sampled: Sampled) -> dict[str, Any]:
    assert sampled.log_probs is not None, "log-probabilities were asked for"
    own = _entry(tokenizer, sampled.token, sampled.log_probs.token)
    return own | {"top_logprobs": [_entry(tokenizer, token, value) for token, value in sampled.log_probs.top]}


def _entry(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    content = _token_bytes(tokenizer, token)
    return {
        "token": token_text(tokenizer, token),
        "logprob": _finite(value),
        "bytes": None if content is None else list(content),
    }


def _token_bytes(tokenizer: Tokenizer, token: int) -> bytes | None:
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else None


def _finite(value: float) -> float:
    return max(value, _LOWEST)


@dataclass(frozen=True)
class Echo:
    """A prompt that is shown before its completion."""

    text: str
    tokens: list[int]


class CompletionReply:
    """The response to a request: one choice for each completion, and the tokens they took.

    Completion i of prompt p is choice p · n + i.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        prompt_tokens: int,
        *,
        log_probs: bool = False,
        echoes: Sequence[Echo | None] = (None,),
        n: int = 1,
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """prompt_tokens: of all prompts. log_probs: whether the client asked for them. echoes: of each prompt. n: completions
        of each. prompt_ids: of each prompt, where the client asked for the ids of all tokens."""
        self._model = model
        self._tokenizer = tokenizer
        self.tells_log_probs = log_probs
        self._echoes = echoes
        self._n = n
        self._created = int(time.time())
        self._identity = uuid.uuid4().hex
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._forms = [CompletionLogProbs(tokenizer) for _ in range(len(echoes) * n)]
        self._begun: set[int] = set()
        self._shows_ids = prompt_ids is not None
        #: Of each choice, the ids of its prompt until the client has been told them.
        self._prompt_ids = {place: prompt_ids[place // n] for place in range(len(echoes) * n)} if prompt_ids is not None else {}
        #: Of each choice, ids that the client has not been told.
        self._ids: list[list[int]] = [[] for _ in range(len(echoes) * n)]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The response of a request that does not stream. completions: the first of each prompt, with its `others`."""
        choices: list[dict[str, Any]] = []
        for completion in completions:
            for one in (completion, *completion.others):
                index = len(choices)
                self._completion_tokens += one.completion_tokens
                text, log_probs = self._part(index, one.text, one.log_probs or [], completion.prompt_log_probs or [])
                self._ids[index] += one.token_ids
                choices.append(self._choice(index, text, log_probs, one.finish_reason))
        cached_tokens = sum(completion.cached_tokens for completion in completions)
        return {**self._head(), "choices": choices, "usage": self._usage(cached_tokens)}

    def events(self, arrived: Iterable[tuple[int, Chunk]], prompts: Sequence[Sequence[Sampled]]) -> Iterator[dict[str, Any]]:
        """Events for the chunks of one or more steps: some text of a choice, and the reason it ended. prompts: of each, the
        log-probabilities of its tokens but the first, where they were asked for."""
        of_choice: dict[int, list[Chunk]] = {}
        for index, chunk in arrived:
            of_choice.setdefault(index, []).append(chunk)
        for index, chunks in of_choice.items():
            self._completion_tokens += sum(len(chunk.token_ids) for chunk in chunks)
            self._ids[index] += [id for chunk in chunks for id in chunk.token_ids]
            sampled = [one for chunk in chunks for one in chunk.log_probs or []]
            text, log_probs = self._part(index, "".join(chunk.text for chunk in chunks), sampled, prompts[index // self._n])
            if text or log_probs:
                yield self._event(index, text, log_probs)
            if (finish_reason := chunks[-1].finish_reason) is not None:
                yield self._event(index, "", None, finish_reason)

    def usage_event(self, cached_tokens: int) -> dict[str, Any]:
        """The event before the end for a client that asked for its usage."""
        return {**self._head(), "choices": [], "usage": self._usage(cached_tokens)}

    def _head(self) -> dict[str, Any]:
        return {"id": f"cmpl-{self._identity}", "object": "text_completion", "created": self._created, "model": self._model}

    def _usage(self, cached_tokens: int) -> dict[str, Any]:
        """Tokens as the model sees them, end tokens included; of a prompt once, however many choices."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }

    def _event(
        self, index: int, text: str, log_probs: dict[str, Any] | None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {**self._head(), "choices": [self._choice(index, text, log_probs, finish_reason)]}

    def _choice(self, index: int, text: str, log_probs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        """A choice, with the ids that have not been told: of its prompt once, as vLLM does."""
        choice = {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish_reason}
        if not self._shows_ids:
            return choice
        ids, self._ids[index] = self._ids[index], []
        prompt = {"prompt_token_ids": list(self._prompt_ids.pop(index))} if index in self._prompt_ids else {}
        return {**choice, "token_ids": ids, **prompt}

    def _part(
        self, index: int, text: str, sampled: Sequence[Sampled], prompt: Sequence[Sampled]
    ) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities of a choice's next part; its first has the echo of the prompt before it."""
        echo = self._echoes[index // self._n] if index not in self._begun else None
        self._begun.add(index)
        if echo is not None:
            text = echo.text + text
        if not self.tells_log_probs:
            return text, None
        form = self._forms[index]
        shown = form.of_prompt(echo.tokens, prompt) if echo is not None else None
        made = form.of(sampled)
        return text, joined(shown, made) if shown is not None else made if sampled else None


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
