"""Responses of Ollama's API: one object, or lines of JSON, each with a part of the answer."""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from bessemer.assistant.messages import BadCall, Called, EndReason, RolledBack, TextDelta, ThinkingDelta, TurnEnd
from bessemer.inference.async_generation import ChoiceChunk
from bessemer.inference.engine import Engine
from bessemer.inference.request import Completion
from bessemer.inference.request import Request as EngineRequest
from bessemer.serving.ollama.protocol import GenerateBody, GenerationBody
from bessemer.serving.openai.replies import chat_log_probs
from bessemer.serving.runtime.bodies import ApiError, withdrawn
from bessemer.serving.runtime.streams import Reply
from bessemer.serving.runtime.worker import ChoiceEvents, Turns

#: Ollama's `done_reason` of a turn.
_DONE: dict[EndReason, str] = {"answer": "stop", "length": "length", "tool_calls": "stop", "rounds": "stop", "refused": "stop"}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in Ollama's form."""
    return {"error": str(error)}


def now() -> str:
    """The time of day as Ollama writes it, in UTC."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass
class Clock:
    """Durations in nanoseconds. Prompt evaluation ends, and evaluation begins, with the first token."""

    begun: int = field(default_factory=time.perf_counter_ns)
    first: int | None = None

    def saw_token(self) -> None:
        self.first = self.first or time.perf_counter_ns()

    def durations(self, prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
        end = time.perf_counter_ns()
        first = self.first or end
        return {
            "total_duration": end - self.begun,
            "load_duration": 0,
            "prompt_eval_count": prompt_tokens,
            "prompt_eval_duration": first - self.begun,
            "eval_count": completion_tokens,
            "eval_duration": end - first,
        }


class Lines(Reply):
    """A response as lines of JSON, each with a part of the answer; without streaming, one object with the whole answer."""

    media_type = "application/x-ndjson"

    def __init__(self, body: GenerationBody) -> None:
        self._name = body.model
        self._clock = Clock()

    def sign_of_life(self, quiet: int) -> str:
        # an empty part, which every client can append
        return self._line(self._part(""), done=False)

    def failed(self, error: ApiError) -> str:
        return _json_line(error_body(error))

    def _line(self, part: dict[str, Any], **rest: Any) -> str:
        return _json_line(self._object(part, **rest))

    def _object(self, part: dict[str, Any], **rest: Any) -> dict[str, Any]:
        return {"model": self._name, "created_at": now(), **part, **rest}

    @abstractmethod
    def _part(self, text: str, thinking: str = "", calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """The fields of an object that hold the text, the thinking and the calls."""


class TurnReply(Lines):
    """A turn of `/api/chat`, and of `/api/generate` through the chat template (`is_chat` false)."""

    def __init__(self, body: GenerationBody, engine: Engine, turns: Turns, is_chat: bool) -> None:
        self._is_chat = is_chat
        super().__init__(body)
        self._wants_log_probs = body.logprobs
        self._tokenizer = engine.tokenizer
        self._turns = turns

    def whole(self, step: Iterable[ChoiceEvents]) -> dict[str, Any]:
        parts = list(self._parts(step))
        calls = [call for part in parts for call in part.calls]
        shown = self._part("".join(part.text for part in parts), "".join(part.thinking for part in parts), calls)
        probabilities = {}
        if self._wants_log_probs:
            probabilities["logprobs"] = [token for part in parts for token in part.log_probs]
        return self._object(shown, **probabilities, **self._end(parts[-1].reason))

    def events(self, step: Iterable[ChoiceEvents]) -> str:
        lines = []
        for part in self._parts(step):
            if part.text or part.thinking or part.calls or part.log_probs:
                shown = self._part(part.text, part.thinking, part.calls)
                probabilities = {"logprobs": part.log_probs} if part.log_probs else {}
                lines.append(self._line(shown, done=False, **probabilities))
            if part.reason:
                lines.append(self._line(self._part(""), **self._end(part.reason)))
        return "".join(lines)

    def _end(self, reason: str) -> dict[str, Any]:
        durations = self._clock.durations(self._turns.prompt_tokens, self._turns.completion_tokens)
        return {"done": True, "done_reason": reason, **durations}

    def _part(self, text: str, thinking: str = "", calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        more: dict[str, Any] = {"thinking": thinking} if thinking else {}
        if not self._is_chat:
            return {"response": text, **more}
        return {"message": {"role": "assistant", "content": text, **more, **({"tool_calls": list(calls)} if calls else {})}}

    def _parts(self, step: Iterable[ChoiceEvents]) -> Iterator[_Part]:
        """What each event of a step adds. Raises ApiError where a hook withdraws text that was sent."""
        for _, events, sampled, _ in step:
            self._clock.saw_token()
            part = _Part(log_probs=chat_log_probs(self._tokenizer, sampled)["content"] if self._wants_log_probs else [])
            for event in events:
                match event:
                    case ThinkingDelta(text):
                        part.thinking += text
                    case TextDelta(text) | BadCall(text):
                        part.text += text
                    case Called(call):
                        part.calls.append({"function": {"name": call.name, "arguments": dict(call.arguments)}})
                    case RolledBack(reason):
                        raise withdrawn(reason)
                    case TurnEnd(reason):
                        part.reason = _DONE[reason]
            yield part


@dataclass
class _Part:
    text: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    log_probs: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""


class TextReply(Lines):
    """The continuation of a text, without the chat template."""

    def __init__(self, body: GenerateBody, engine: Engine, request: EngineRequest) -> None:
        super().__init__(body)
        self._wants_log_probs = body.logprobs
        self._tokenizer = engine.tokenizer
        self._request = request
        self._tokens = 0

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        (completion,) = completions
        self._clock.saw_token()
        self._tokens = completion.completion_tokens
        probabilities = {}
        if self._wants_log_probs:
            probabilities["logprobs"] = chat_log_probs(self._tokenizer, completion.log_probs or ())["content"]
        return self._object(self._part(completion.text), **probabilities, **self._end(completion.finish_reason))

    def events(self, step: Iterable[ChoiceChunk]) -> str:
        lines = []
        for _, chunk in step:
            self._clock.saw_token()
            self._tokens += len(chunk.token_ids)
            probabilities = {}
            if self._wants_log_probs and chunk.log_probs:
                probabilities["logprobs"] = chat_log_probs(self._tokenizer, chunk.log_probs)["content"]
            if chunk.text or probabilities:
                lines.append(self._line(self._part(chunk.text), done=False, **probabilities))
            if chunk.finish_reason is not None:
                lines.append(self._line(self._part(""), **self._end(chunk.finish_reason)))
        return "".join(lines)

    def _end(self, reason: str | None) -> dict[str, Any]:
        durations = self._clock.durations(self._request.prompt_tokens, self._tokens)
        return {"done": True, "done_reason": reason, **durations}

    def _part(self, text: str, thinking: str = "", calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        return {"response": text}


def _json_line(value: dict[str, Any]) -> str:
    # JSON escapes what is not ASCII, so that no character is taken for the end of the line
    return json.dumps(value) + "\n"
