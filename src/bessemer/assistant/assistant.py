"""The assistant: turns of conversations, with a model, tools and hooks. The model is an engine, or behind an API."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

from bessemer.assistant.conversation import LOCAL, AssistantConfig, Conversation, Principal
from bessemer.assistant.generation import Delta, Generation
from bessemer.assistant.hooks import Hook, Hooks
from bessemer.assistant.messages import BadCall, Event, Message
from bessemer.assistant.parser import ParsedCall, read_json_calls
from bessemer.assistant.tool_formats import TOOL_FORMATS, format_of, format_of_template
from bessemer.assistant.tools import Tool, ToolChoice
from bessemer.assistant.turn import Turn
from bessemer.core.chat_client import ChatClient, with_json_arguments
from bessemer.core.errors import ConfigError
from bessemer.inference.engine import Engine
from bessemer.inference.request import Chunk, Request
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tokenization.tokenizer import Tokenizer


class ChatModel(Protocol):
    """A source of messages."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of a model whose prompts are token ids; None: they are messages."""

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and completion together, where known."""

    def stream(self, generation: Generation) -> Generator[Delta, None, None]:
        """The completion as it comes; the last delta has the finish reason. Closing it ends the request."""


class EngineModel:
    """An engine. Any number of turns, each on its own thread, share its steps."""

    def __init__(self, engine: Engine, *, adapter: str | None = None, cache_salt: str | None = None, priority: int = 0) -> None:
        """adapter, cache_salt, priority: as in `Engine.stream`."""
        self.engine = engine
        self._options: dict[str, Any] = {"priority": priority, "adapter": adapter, "cache_salt": cache_salt}

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def context_length(self) -> int:
        return self.engine.context_length

    def stream(self, generation: Generation) -> Generator[Delta, None, None]:
        """Raises RequestError for a prompt that does not fit."""
        with closing(self.engine.stream(generation.token_ids, generation.params, **self._options)) as chunks:
            for chunk in chunks:
                yield self.delta(chunk)

    def prepare(self, generation: Generation) -> Request:
        """A request that has not begun, for a caller that steps the engine itself. Raises as `stream`."""
        return self.engine.prepare(generation.token_ids, generation.params, **self._options)

    def delta(self, chunk: Chunk) -> Delta:
        """A chunk of a request as a delta."""
        log_probs = None
        if chunk.log_probs is not None:
            log_probs = [token.log_probs.token for token in chunk.log_probs if token.log_probs is not None]
        return Delta(chunk.token_ids, log_probs, self.engine.weight_version, finish_reason=chunk.finish_reason)


class ApiModel:
    """A model behind an API of chat completions. The client has its sampling settings; there are no token ids."""

    tokenizer = None
    context_length = None

    def __init__(self, client: ChatClient) -> None:
        self._client = client

    def stream(self, generation: Generation) -> Generator[Delta, None, None]:
        """One delta with the whole answer. Raises ApiError."""
        choice = self._client.answer(with_json_arguments(generation.messages), generation.tools)
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


class TurnMaker:
    """Makes turns for a caller that drives them, as `Turn` says."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        context_length: int | None,
        params: SamplingParams | None = None,
        tools: Sequence[Tool] = (),
        config: AssistantConfig | None = None,
    ) -> None:
        """tokenizer, context_length: None for a model behind an API. The others, and the errors: as in `Assistant`."""
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._params = params or SamplingParams()
        self._tools = tuple(tools)
        self._config = config or AssistantConfig()
        names = [tool.name for tool in tools]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"two tools are called {repeated!r}; give each a name of its own")
        if self._config.thinking_budget is not None and tokenizer is None:
            raise ConfigError("thinking_budget: it takes a model of this machine; an API has no tokens to count")
        if self._config.tool_format is not None:
            self._format = TOOL_FORMATS.find(self._config.tool_format).load()
        else:
            self._format = format_of_template(None) if tokenizer is None else format_of(tokenizer)

    def start(
        self,
        conversation: Conversation,
        principal: Principal = LOCAL,
        hooks: Sequence[Hook] = (),
        *,
        params: SamplingParams | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        thinking_budget: int | None = None,
        max_rounds: int | None = None,
        answer_prefix: Message | None = None,
    ) -> Turn:
        """A turn that has not begun. params, tools, thinking_budget, max_rounds: override the assistant's own. answer_prefix:
        as of `Turn`."""
        config = self._config
        if thinking_budget is not None:
            config = config.with_changes(thinking_budget=thinking_budget)
        if max_rounds is not None:
            config = config.with_changes(max_rounds=max_rounds)
        return Turn(
            conversation,
            principal,
            Hooks(tuple(hooks)),
            tools=self._tools if tools is None else tools,
            tool_format=self._format,
            tool_choice=tool_choice or ToolChoice(),
            params=self._params if params is None else params,
            config=config,
            tokenizer=self._tokenizer,
            context_length=self._context_length,
            answer_prefix=answer_prefix,
        )


class Assistant(TurnMaker):
    """A model that answers conversations. It holds none itself; any number of turns may run at once."""

    def __init__(
        self,
        model: ChatModel,
        params: SamplingParams | None = None,
        tools: Sequence[Tool] = (),
        config: AssistantConfig | None = None,
    ) -> None:
        """params: of each message, for an engine. Raises ConfigError for two tools of one name, an unknown tool format, and a
        thinking budget with an API."""
        super().__init__(model.tokenizer, model.context_length, params, tools, config)
        self.model = model

    def turn(
        self,
        conversation: Conversation,
        principal: Principal = LOCAL,
        hooks: Sequence[Hook] = (),
        *,
        tools: Sequence[Tool] | None = None,
    ) -> Generator[Event, None, None]:
        """Answer the end of the conversation, and add the turn's messages and tokens to it. tools: in place of the assistant's
        own.

        Begins with the first event; the last one is a `TurnEnd`. Closed early, or interrupted, the conversation keeps what was
        given out. Raises RequestError for a conversation that does not fit or has nothing to answer, and the model's errors;
        the conversation is then as before that round.
        """
        turn = self.start(conversation, principal, hooks, tools=tools)
        try:
            yield from turn.begin()
            while turn.end is None:
                generation = turn.generation
                if generation is None:
                    yield from turn.run_tools()
                    continue
                with closing(self.model.stream(generation)) as deltas:
                    for delta in deltas:
                        yield from turn.take(delta)
                        if turn.generation is not generation:
                            break
        except BaseException:
            turn.interrupt()
            raise

    def answer(self, conversation: Conversation, principal: Principal = LOCAL, hooks: Sequence[Hook] = ()) -> Message:
        """The assistant's last message of a turn."""
        for _ in self.turn(conversation, principal, hooks):
            pass
        return next(message for message in reversed(conversation.messages) if message.role == "assistant")
