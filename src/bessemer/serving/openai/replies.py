"""Responses to chat and plain completions, whole or event by event, and their log-probabilities in OpenAI's two forms."""

from __future__ import annotations

import json
import time
import uuid
from abc import abstractmethod
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
from bessemer.inference.request import Chunk, Completion, Request
from bessemer.inference.sampling.sampler import Sampled
from bessemer.retrieval.citations import Entails
from bessemer.serving.openai.protocol import ChatRequest, CompletionRequest, GenerationRequest
from bessemer.serving.retrieval.annotations import AnswerCitations, source_body
from bessemer.serving.runtime.bodies import ApiError, withdrawn
from bessemer.serving.runtime.streams import Reply, server_sent_event
from bessemer.serving.runtime.worker import ChoiceEvents, Turns
from bessemer.tokenization.prompts import StreamingDecoder
from bessemer.tokenization.tokenizer import Tokenizer

#: JSON has no infinity: log-probabilities at or below this are given as this, as in other servers.
_LOWEST = -9999.0


def token_text(tokenizer: Tokenizer, token: int, as_id: bool = False) -> str:
    r"""A token in a response: its text, `bytes:\xe6` for a part of a character (as OpenAI writes it), and `token_id:7` for an
    id beyond the tokenizer's vocabulary, or for any with `as_id`."""
    content = None if as_id else _token_bytes(tokenizer, token)
    if content is None:
        return f"token_id:{token}"
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def chat_log_probs(tokenizer: Tokenizer, sampled: Sequence[Sampled], as_ids: bool = False) -> dict[str, Any]:
    """The `logprobs` of a chat choice, or of one event of its stream. as_ids: tokens are written as in `token_text`."""
    return {"content": [_chat_token(tokenizer, token, as_ids) for token in sampled], "refusal": None}


class CompletionLogProbs:
    """The `logprobs` of a plain completion's choice. A stream gives them in several parts, whose text offsets continue."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        """as_ids: tokens are written as in `token_text`."""
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._decoder = StreamingDecoder(tokenizer)
        self._length = 0

    def of_prompt(self, prompt: Sequence[int], sampled: Sequence[Sampled]) -> dict[str, list[Any]]:
        """Of an echoed prompt. Its first token has no log-probability: nothing comes before it."""
        assert len(sampled) == len(prompt) - 1, "every token of the prompt but the first has its log-probability"
        first: dict[str, list[Any]] = {
            "tokens": [token_text(self._tokenizer, prompt[0], self._as_ids)],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [self._offset(prompt[0])],
        }
        return joined(first, self.of(sampled))

    def of(self, sampled: Sequence[Sampled]) -> dict[str, list[Any]]:
        """Of the next tokens. `top_logprobs` holds the likeliest and the sampled token itself."""
        part: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, log_probs in sampled:
            assert log_probs is not None, "the request has log-probabilities"
            text = token_text(self._tokenizer, token, self._as_ids)
            top: dict[str, float] = {}
            for id, value in log_probs.top:
                top.setdefault(token_text(self._tokenizer, id, self._as_ids), _finite(value))
            top.setdefault(text, _finite(log_probs.token))
            part["tokens"].append(text)
            part["token_logprobs"].append(_finite(log_probs.token))
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
    """Two consecutive parts of a plain completion's log-probabilities as one."""
    return {name: first[name] + second[name] for name in first}


def _chat_token(tokenizer: Tokenizer, sampled: Sampled, as_id: bool) -> dict[str, Any]:
    assert sampled.log_probs is not None, "the request has log-probabilities"
    own = _entry(tokenizer, sampled.token, sampled.log_probs.token, as_id)
    return own | {"top_logprobs": [_entry(tokenizer, token, value, as_id) for token, value in sampled.log_probs.top]}


def _entry(tokenizer: Tokenizer, token: int, value: float, as_id: bool) -> dict[str, Any]:
    content = _token_bytes(tokenizer, token)
    return {
        "token": token_text(tokenizer, token, as_id),
        "logprob": _finite(value),
        "bytes": None if content is None else list(content),
    }


def _token_bytes(tokenizer: Tokenizer, token: int) -> bytes | None:
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else None


def _finite(value: float) -> float:
    return max(value, _LOWEST)


class _OpenAIReply(Reply):
    """What the responses of chat and plain completions share."""

    #: The `object` of an event.
    event_kind: str

    def __init__(self, body: GenerationRequest, tokenizer: Tokenizer, prefix: str) -> None:
        """prefix: of the response's id."""
        self._body = body
        self._tokenizer = tokenizer
        self._id = f"{prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    @property
    def is_large(self) -> bool:
        """Log-probabilities give each token up to twenty alternatives."""
        return self._body.wants_log_probs

    def events(self, step: Any) -> str:
        return "".join(map(self._sent, self._bodies(step)))

    def end(self) -> str:
        done = "data: [DONE]\n\n"
        if not self._body.wants_usage:
            return done
        return self._sent({**self._head(self.event_kind), "choices": [], "usage": self._usage()}) + done

    def failed(self, error: ApiError) -> str:
        return self._sent(error.body())

    def _sent(self, body: dict[str, Any]) -> str:
        """An event. Where the client wants usage, every event has the key, and the one before the end fills it."""
        return server_sent_event({"usage": None, **body} if self._body.wants_usage else body)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._body.model}

    @abstractmethod
    def _bodies(self, step: Any) -> Iterator[dict[str, Any]]:
        """Bodies of the events of a step."""

    @abstractmethod
    def _usage(self) -> dict[str, Any]: ...


def _usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Tokens as the model sees them, end tokens included; of a prompt once, however many choices."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


@dataclass(frozen=True)
class Echo:
    """A prompt that is returned before its completion."""

    text: str
    tokens: list[int]


class CompletionReply(_OpenAIReply):
    """The response to `/v1/completions`. Completion i of prompt p is choice p · n + i."""

    event_kind = "text_completion"
    _body: CompletionRequest

    def __init__(
        self,
        body: CompletionRequest,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        echoes: Sequence[Echo | None],
        requests: Sequence[Request],
    ) -> None:
        """prompts, echoes, requests: one for each prompt."""
        super().__init__(body, tokenizer, "cmpl")
        self._prompts = prompts
        self._echoes = echoes
        self._requests = requests
        self._n = body.n
        choices = range(len(prompts) * body.n)
        self._completion_tokens = 0
        self._log_probs = [CompletionLogProbs(tokenizer, body.return_tokens_as_token_ids) for _ in choices]
        #: Choices of which nothing was sent: their first part has the echo, and the ids of the prompt.
        self._without_echo = set(choices)
        self._without_prompt_ids = set(choices if body.return_token_ids else ())
        #: Token ids of each choice that are yet to be sent.
        self._ids: list[list[int]] = [[] for _ in choices]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The body. completions: the first of each prompt, with its `others`."""
        choices: list[dict[str, Any]] = []
        for first in completions:
            for completion in (first, *first.others):
                index = len(choices)
                self._completion_tokens += completion.completion_tokens
                text, log_probs = self._part(index, completion.text, completion.log_probs or [], first.prompt_log_probs or [])
                self._ids[index] += completion.token_ids
                choices.append(self._choice(index, text, log_probs, completion.finish_reason))
        if self._body.return_weight_versions:
            made = [each for request in self._requests for each in (request, *request.siblings)]
            for choice, request in zip(choices, made, strict=True):
                choice["weight_versions"] = list(request.weight_versions)
        return {**self._head("text_completion"), "choices": choices, "usage": self._usage()}

    def _bodies(self, step: Iterable[tuple[int, Chunk]]) -> Iterator[dict[str, Any]]:
        """Text of a choice, and then why it ended. A prompt's log-probabilities are complete before its first chunk."""
        of_choice: dict[int, list[Chunk]] = {}
        for index, chunk in step:
            of_choice.setdefault(index, []).append(chunk)
        for index, chunks in of_choice.items():
            self._completion_tokens += sum(len(chunk.token_ids) for chunk in chunks)
            self._ids[index] += [id for chunk in chunks for id in chunk.token_ids]
            sampled = [token for chunk in chunks for token in chunk.log_probs or []]
            prompt_log_probs = self._requests[index // self._n].prompt_log_probs
            text, log_probs = self._part(index, "".join(chunk.text for chunk in chunks), sampled, prompt_log_probs)
            if text or log_probs:
                yield self._event(index, text, log_probs)
            if (finish_reason := chunks[-1].finish_reason) is not None:
                yield self._event(index, "", None, finish_reason)

    def _usage(self) -> dict[str, Any]:
        cached_tokens = sum(request.cached_tokens for request in self._requests)
        return _usage_of(sum(map(len, self._prompts)), self._completion_tokens, cached_tokens)

    def _event(
        self, index: int, text: str, log_probs: dict[str, Any] | None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {**self._head("text_completion"), "choices": [self._choice(index, text, log_probs, finish_reason)]}

    def _choice(self, index: int, text: str, log_probs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        """A choice, with the ids that are yet to be sent: those of its prompt once, as vLLM does."""
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish_reason}
        if self._body.return_token_ids:
            choice["token_ids"], self._ids[index] = self._ids[index], []
        if index in self._without_prompt_ids:
            self._without_prompt_ids.remove(index)
            choice["prompt_token_ids"] = list(self._prompts[index // self._n])
        return choice

    def _part(
        self, index: int, text: str, sampled: Sequence[Sampled], prompt: Sequence[Sampled]
    ) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities of a choice's next part. The first one begins with the echo of the prompt."""
        echo = self._echoes[index // self._n] if index in self._without_echo else None
        self._without_echo.discard(index)
        if echo is not None:
            text = echo.text + text
        if not self._body.wants_log_probs:
            return text, None
        log_probs = self._log_probs[index]
        echoed = log_probs.of_prompt(echo.tokens, prompt) if echo is not None else None
        own = log_probs.of(sampled)
        return text, joined(echoed, own) if echoed is not None else own if sampled else None


#: OpenAI's `finish_reason` of a turn.
_FINISH: dict[EndReason, str] = {
    "answer": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "rounds": "tool_calls",
    "refused": "content_filter",
}


@dataclass
class _Choice:
    """An answer so far. token_ids: those that are yet to be sent."""

    text: str = ""
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    has_begun: bool = False
    #: Of an answer from sources.
    citations: AnswerCitations | None = None


class ChatReply(_OpenAIReply):
    """The response to `/v1/chat/completions`: one choice for each answer.

    An answer from sources has `annotations`, in a stream those of each event; its choice has `statements` in the end; the
    response, or the first event, has the sources under `retrieval`, and where summaries stand for a part of the conversation,
    their tokens under `context_overflow`.
    """

    event_kind = "chat.completion.chunk"
    _body: ChatRequest

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer, turns: Turns, entails: Entails | None = None) -> None:
        """entails: judges the sentences of an answer from sources, besides their words."""
        super().__init__(body, tokenizer, "chatcmpl")
        self._turns = turns
        self._shows_thinking = body.include_reasoning
        self._lacks_prompt_ids = body.return_token_ids
        self._sources = sources = None if body.retrieval is None else turns.sources
        citations = (None if sources is None else AnswerCitations(sources, entails) for _ in range(body.n))
        self._choices = [_Choice(citations=own) for own in citations]
        self._judges = sources is not None and entails is not None
        self._lacks_sources = sources is not None
        self._lacks_summaries = turns.summarised is not None

    @property
    def is_large(self) -> bool:
        """A language model judges each sentence."""
        return super().is_large or self._judges

    def ends_long(self, step: Iterable[ChoiceEvents]) -> bool:
        return self._judges and any(isinstance(event, TurnEnd) for _, events, *_ in step for event in events)

    def whole(self, step: Iterable[ChoiceEvents]) -> dict[str, Any]:
        """The body. step: all events of all choices."""
        for index, events, sampled, token_ids in step:
            self._choices[index].sampled += sampled
            self._choices[index].token_ids += token_ids
            for _ in self._deltas(self._choices[index], events):
                pass
        choices = []
        for index, choice in enumerate(self._choices):
            message: dict[str, Any] = {"role": "assistant", "content": choice.text or (None if choice.calls else "")}
            if choice.thinking and self._shows_thinking:
                message |= _reasoning(choice.thinking)
            if choice.calls:
                message["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call)}}
                    for call in choice.calls
                ]
            if choice.citations is not None:
                message["annotations"] = choice.citations.annotations
            log_probs = self._log_probs(choice.sampled) if self._body.wants_log_probs else None
            ids = {"token_ids": choice.token_ids} if self._body.return_token_ids else {}
            shown = {"index": index, "message": message, "logprobs": log_probs, "finish_reason": choice.finish_reason, **ids}
            choices.append(shown | _statements(choice))
        prompt = {"prompt_token_ids": self._turns.prompt_ids} if self._body.return_token_ids else {}
        body = {**self._head("chat.completion"), "choices": choices, "usage": self._usage(), **prompt}
        if self._sources is not None:
            body["retrieval"] = self._retrieval()
        return body if self._turns.summarised is None else {**body, "context_overflow": self._turns.summarised}

    def _log_probs(self, sampled: Sequence[Sampled]) -> dict[str, Any]:
        return chat_log_probs(self._tokenizer, sampled, self._body.return_tokens_as_token_ids)

    def _retrieval(self) -> dict[str, Any]:
        """The sources of the answers."""
        return {"sources": [source_body(number, hit) for number, hit in enumerate(self._sources or (), start=1)]}

    def _bodies(self, step: Iterable[ChoiceEvents]) -> Iterator[dict[str, Any]]:
        """A choice's role comes with its first token, as in vLLM: clients take the first event for it."""
        for index, events, sampled, token_ids in _by_choice(step):
            choice = self._choices[index]
            choice.token_ids += token_ids
            if not choice.has_begun:
                choice.has_begun = True
                yield self._event(index, {"role": "assistant", "content": ""})
            # the first event has the log-probabilities of all
            log_probs = self._log_probs(sampled) if sampled and self._body.wants_log_probs else None
            for delta in self._deltas(choice, events):
                yield self._event(index, delta, log_probs)
                log_probs = None
            if log_probs is not None:
                yield self._event(index, {"content": ""}, log_probs)
            if choice.finish_reason is not None:
                yield self._event(index, {}, None, choice.finish_reason)

    def _deltas(self, choice: _Choice, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
        """The deltas of events, which are added to the choice. Raises ApiError where a hook withdraws what was sent."""
        for event in events:
            match event:
                case ThinkingDelta(text):
                    choice.thinking += text
                    if self._shows_thinking:
                        yield _reasoning(text)
                case TextDelta(text) | BadCall(text):
                    choice.text += text
                    yield {"content": text}
                    if choice.citations is not None and (annotations := choice.citations.feed(text)):
                        yield {"annotations": annotations}
                case Called(call):
                    index = len(choice.calls)
                    choice.calls.append(call)
                    named = {"name": call.name, "arguments": ""}
                    yield {"tool_calls": [{"index": index, "id": call.id, "type": "function", "function": named}]}
                    yield {"tool_calls": [{"index": index, "function": {"arguments": _arguments(call)}}]}
                case RolledBack(reason):
                    raise withdrawn(reason)
                case TurnEnd(reason):
                    choice.finish_reason = "stop" if reason == "rounds" and not choice.calls else _FINISH[reason]

    def _usage(self) -> dict[str, Any]:
        turns = self._turns
        reasoning = sum(
            len(self._tokenizer.encode(choice.thinking, add_bos=False)) for choice in self._choices if choice.thinking
        )
        return {
            **_usage_of(turns.prompt_tokens, turns.completion_tokens, turns.cached_tokens),
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    def _event(
        self, index: int, delta: dict[str, Any], log_probs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish_reason}
        event = {**self._head(self.event_kind), "choices": [choice]}
        if finish_reason is not None:
            choice |= _statements(self._choices[index])
        if self._body.return_token_ids:
            choice["token_ids"], self._choices[index].token_ids = self._choices[index].token_ids, []
        if self._lacks_prompt_ids:
            self._lacks_prompt_ids = False
            event["prompt_token_ids"] = self._turns.prompt_ids
        if self._lacks_sources:
            self._lacks_sources = False
            event["retrieval"] = self._retrieval()
        if self._lacks_summaries:
            self._lacks_summaries = False
            event["context_overflow"] = self._turns.summarised
        return event


def _by_choice(step: Iterable[ChoiceEvents]) -> Iterator[ChoiceEvents]:
    """Events of several steps as one entry for each choice; consecutive texts are joined."""
    of_choice: dict[int, tuple[list[Event], list[Sampled], list[int]]] = {}
    for choice, new_events, new_sampled, new_ids in step:
        events, sampled, token_ids = of_choice.setdefault(choice, ([], [], []))
        sampled += new_sampled
        token_ids += new_ids
        for event in new_events:
            last = events[-1] if events else None
            if isinstance(event, TextDelta | ThinkingDelta) and type(last) is type(event):
                events[-1] = type(event)(last.text + event.text)
            else:
                events.append(event)
    return (ChoiceEvents(choice, *parts) for choice, parts in of_choice.items())


def _statements(choice: _Choice) -> dict[str, Any]:
    """The sentences of an answer from sources."""
    return {} if choice.citations is None else {"statements": choice.citations.statements()}


def _reasoning(text: str) -> dict[str, str]:
    """Thinking as vLLM names it, and as DeepSeek and llama.cpp do."""
    return {"reasoning": text, "reasoning_content": text}


def _arguments(call: ToolCall) -> str:
    return json.dumps(call.arguments, ensure_ascii=False)
