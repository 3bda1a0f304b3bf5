"""A model of Inspect's evaluations: an engine in this process, or a server of ours or of others.

Messages and tools are read and written by the assistant, as `serve` does it: calls as the model's own template has them.
Inspect sends many at once, each on a thread of its own, and all share the engine's steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import anyio.to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    modelapi,
)
from inspect_ai.tool import ToolCall, ToolChoice, ToolFunction, ToolInfo

from bessemer.assistant.assistant import ApiModel, EngineModel, TurnMaker
from bessemer.assistant.conversation import Conversation, with_system_in_place
from bessemer.assistant.messages import BadCall, Called, TextDelta, ThinkingDelta, TurnEnd, as_messages, with_call_ids
from bessemer.assistant.tools import Tool
from bessemer.assistant.tools import ToolChoice as OwnChoice
from bessemer.core.chat_client import ChatClient
from bessemer.core.errors import ConfigError, RequestError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.formats import find_model

#: Tokens of an answer from a server, which is asked before its prompt's tokens are known.
_MAX_TOKENS = 1024
_STOP_REASONS: dict[str, StopReason] = {
    "answer": "stop",
    "length": "max_tokens",
    "rounds": "stop",
    "tool_calls": "tool_calls",
    "refused": "content_filter",
}


@modelapi(name="bessemer")
class BessemerAPI(ModelAPI):
    """`bessemer/MODEL`. model_args: the device, and settings of the engine (`-M max_num_seqs=16`)."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        device: str = "auto",
        **model_args: Any,
    ) -> None:
        """model_name: a model's folder, a GGUF file, or a pulled model's name; with base_url, the name by which a server has
        it, whose key is in the variable BESSEMER_API_KEY. Raises ConfigError for settings of an engine with a server, and for
        unknown ones."""
        super().__init__(model_name, base_url, api_key, ["BESSEMER_API_KEY"], config or GenerateConfig())
        if base_url is not None and model_args:
            raise ConfigError(f"model_args: a server has its own {', '.join(sorted(model_args))}")
        self._own: EngineModel | None = None
        if base_url is None:
            named = find_model(model_name)
            path = model_name if named is None or named.kind in ("hub", "package") else named.path
            engine = Engine(path, device=device, config=EngineConfig.parse(model_args, "model_args"))
            self._own = EngineModel(engine)
        tokenizer, context = (None, None) if self._own is None else (self._own.tokenizer, self._own.context_length)
        self._turns = TurnMaker(tokenizer, context)

    def max_connections(self) -> int:
        """Conversations at once: as many as the engine computes in a step."""
        return 8 if self._own is None else self._own.engine.max_num_seqs

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """The answer, or as many as `num_choices`. Raises RequestError for a conversation that does not fit, or has what is
        not read here."""
        answers = [
            await anyio.to_thread.run_sync(self._answer, input, tools, tool_choice, config, number)
            for number in range(config.num_choices or 1)
        ]
        output = ModelOutput(model=self.model_name, choices=[choice for choice, _ in answers])
        ends = [end for _, end in answers]
        written = sum(end.completion_tokens for end in ends)
        if self._own is not None:
            read = ends[0].prompt_tokens
            output.usage = ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
        return output

    def _answer(
        self,
        input: Sequence[ChatMessage],
        tools: Sequence[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
        number: int,
    ) -> tuple[ChatCompletionChoice, TurnEnd]:
        messages = as_messages([_in_chat(message) for message in input])
        model: EngineModel | ApiModel
        if self._own is not None:
            model = self._own
            messages = with_call_ids(with_system_in_place(messages, model.tokenizer))
        else:
            model = ApiModel(self._client(config))
        turn = self._turns.start(
            Conversation(messages, follows_assistant=True),
            tools=[] if tool_choice == "none" else [_tool(tool) for tool in tools],
            tool_choice=_choice(tool_choice, config),
            thinking_budget=config.reasoning_tokens,
            max_rounds=1,
        )

        def params_of(prompt_tokens: int) -> SamplingParams:
            left = _MAX_TOKENS if model.context_length is None else max(1, model.context_length - prompt_tokens)
            return _params(config, min(config.max_tokens or left, left), number)

        events = [*turn.begin(params_of)]
        while turn.end is None:
            generation = turn.generation
            if generation is None:
                events += turn.run_tools()
                continue
            for delta in model.stream(generation):
                events += turn.take(delta)
                if turn.generation is not generation:
                    break
        assert turn.end is not None
        return self._choice_of(events, turn.end), turn.end

    def _choice_of(self, events: Sequence[Any], end: TurnEnd) -> ChatCompletionChoice:
        thinking = "".join(event.text for event in events if isinstance(event, ThinkingDelta))
        text = "".join(event.text for event in events if isinstance(event, TextDelta | BadCall))
        calls = [
            ToolCall(event.call.id, event.call.name, dict(event.call.arguments))
            for event in events
            if isinstance(event, Called)
        ]
        content: Any = text if not thinking else [ContentReasoning(reasoning=thinking), ContentText(text=text)]
        message = ChatMessageAssistant(content=content, tool_calls=calls or None, model=self.model_name, source="generate")
        return ChatCompletionChoice(message=message, stop_reason=_STOP_REASONS[end.reason])

    def _client(self, config: GenerateConfig) -> ChatClient:
        assert self.base_url is not None
        return ChatClient(
            self.base_url,
            self.model_name,
            key_variable="BESSEMER_API_KEY" if self.api_key else "",
            max_tokens=config.max_tokens or _MAX_TOKENS,
            temperature=0.0 if config.temperature is None else config.temperature,
        )


def _in_chat(message: ChatMessage) -> dict[str, Any]:
    """A message of Inspect's in the form of chat completions."""
    given: dict[str, Any] = {"role": message.role, "content": _text(message)}
    if isinstance(message, ChatMessageAssistant):
        if message.tool_calls:
            given["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function, "arguments": json.dumps(call.arguments)},
                }
                for call in message.tool_calls
            ]
    elif isinstance(message, ChatMessageTool):
        given |= {"tool_call_id": message.tool_call_id or "", "name": message.function or ""}
        if message.error is not None:
            given["content"] = f"error: {message.error.message}"
    return given


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    other = sorted({part.type for part in message.content} - {"text", "reasoning"})
    if other:
        raise RequestError(f"messages of Inspect are taken as text, and this one has {', '.join(other)}")
    return "".join(part.text for part in message.content if isinstance(part, ContentText))


def _tool(info: ToolInfo) -> Tool:
    return Tool(info.name, info.description, info.parameters.model_dump(mode="json", exclude_none=True))


def _choice(choice: ToolChoice, config: GenerateConfig) -> OwnChoice:
    in_parallel = config.parallel_tool_calls is not False
    if isinstance(choice, ToolFunction):
        return OwnChoice(True, choice.name, in_parallel)
    return OwnChoice(choice == "any", None, in_parallel)


def _params(config: GenerateConfig, max_tokens: int, number: int) -> SamplingParams:
    """The engine's settings. number: of several answers to one request, each of which has a seed of its own."""
    given: dict[str, Any] = {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "stop": config.stop_seqs,
        "frequency_penalty": config.frequency_penalty,
        "presence_penalty": config.presence_penalty,
        "logit_bias": config.logit_bias,
        "seed": None if config.seed is None else config.seed + number,
    }
    if config.response_schema is not None:
        given["json_schema"] = config.response_schema.json_schema.model_dump(mode="json", exclude_none=True)
    return SamplingParams(max_tokens=max_tokens, **{name: value for name, value in given.items() if value is not None})
