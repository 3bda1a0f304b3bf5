"""What generates a turn's messages: an engine of this machine, or an API of chat completions."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

from bessemer.assistant.events import BadCall
from bessemer.assistant.generation import Delta, Generation
from bessemer.assistant.json_calls import ParsedCall, read_json_calls
from bessemer.core.chat_client import ChatClient
from bessemer.inference.engine import Engine
from bessemer.inference.request import Chunk, Request
from bessemer.tokenization.tokenizer import Tokenizer


class ChatModel(Protocol):
    """Generates messages."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of a model that is given token ids; None: it is given messages."""

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and completion together, where that is known."""

    def stream(self, generation: Generation) -> Generator[Delta, None, None]:
        """The completion as it comes; the last delta has the finish reason. Closing it ends the request."""


class EngineModel:
    """An engine of this machine. Any number of turns, each on a thread of its own, share its steps."""

    def __init__(self, engine: Engine, *, adapter: str | None = None, cache_salt: str | None = None, priority: int = 0) -> None:
        """adapter, cache_salt, priority: as of `Engine.stream`."""
        self.engine = engine
        self._adapter = adapter
        self._cache_salt = cache_salt
        self._priority = priority

    @property
    def tokenizer(self) -> Tokenizer:
        """The engine's."""
        return self.engine.tokenizer

    @property
    def context_length(self) -> int:
        """The engine's."""
        return self.engine.context_length

    def stream(self, generation: Generation) -> Generator[Delta, None, None]:
        """Raises RequestError for a prompt that does not fit."""
        chunks = self.engine.stream(
            generation.token_ids,
            generation.params,
            priority=self._priority,
            adapter=self._adapter,
            cache_salt=self._cache_salt,
        )
        with closing(chunks):
            for chunk in chunks:
                yield self.delta(chunk)

    def prepare(self, generation: Generation) -> Request:
        """A request that has not begun, for a caller with a loop of its own. Raises as `stream`."""
        return self.engine.prepare(
            generation.token_ids,
            generation.params,
            priority=self._priority,
            adapter=self._adapter,
            cache_salt=self._cache_salt,
        )

    def delta(self, chunk: Chunk) -> Delta:
        """A chunk of a request as a delta."""
        log_probs = None
        if chunk.log_probs is not None:
            log_probs = [one.log_probs.token for one in chunk.log_probs if one.log_probs is not None]
        return Delta(chunk.token_ids, log_probs, self.engine.weight_version, finish_reason=chunk.finish_reason)


class ApiModel:
    """A model behind an API of chat completions. How it samples is the client's to say; there are no token ids."""

    tokenizer = None
    context_length = None

    def __init__(self, client: ChatClient) -> None:
        self._client = client

    def stream(self, generation: Generation) -> Generator[Delta, None, None]:
        """One delta, the whole answer. Raises ApiError."""
        choice = self._client.answer(_with_texts_of_arguments(generation.messages), generation.tools)
        message = choice["message"]
        calls = [_call(call) for call in message.get("tool_calls") or ()]
        yield Delta(
            text=_text(message, "content"),
            thinking=_text(message, "reasoning_content") or _text(message, "reasoning"),
            calls=calls,
            finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
        )


def _text(message: Mapping[str, Any], key: str) -> str:
    value = message.get(key)
    return value if isinstance(value, str) else ""


def _call(call: Any) -> ParsedCall | BadCall:
    # a lone surrogate has no UTF-8
    written = json.dumps(call, ensure_ascii=False).encode("utf-8", "replace").decode()
    try:
        (parsed,) = read_json_calls(json.dumps(call["function"]))
    except (ValueError, LookupError, TypeError) as error:
        return BadCall(written, str(error))
    return parsed


def _with_texts_of_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls have their arguments as JSON texts, which is the form of an API."""
    given = []
    for message in messages:
        calls = [
            {
                **call,
                "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)},
            }
            for call in message.get("tool_calls", ())
        ]
        plain = {key: value for key, value in message.items() if key not in ("tool_calls", "reasoning_content")}
        given.append(plain | ({"tool_calls": calls} if calls else {}))
    return given
