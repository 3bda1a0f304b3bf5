"""The assistant: turns of conversations, with a model, tools and hooks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

from bessemer.assistant.config import AssistantConfig
from bessemer.assistant.conversation import Conversation
from bessemer.assistant.events import Event
from bessemer.assistant.hooks import Hook, Hooks
from bessemer.assistant.messages import Message
from bessemer.assistant.models import ChatModel
from bessemer.assistant.principal import LOCAL, Principal
from bessemer.assistant.tool_formats import TOOL_FORMATS, format_of_template
from bessemer.assistant.tools import Tool, ToolChoice
from bessemer.assistant.turn import Turn
from bessemer.core.errors import ConfigError
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tokenization.tokenizer import Tokenizer


class TurnMaker:
    """Begins turns for a caller who drives them."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        context_length: int | None,
        params: SamplingParams | None = None,
        tools: Sequence[Tool] = (),
        config: AssistantConfig | None = None,
    ) -> None:
        """tokenizer, context_length: None of a model that is given messages. The others, and the errors: as of `Assistant`."""
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
            self._format = format_of_template(None if tokenizer is None else tokenizer.chat_template)

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
        begun: Message | None = None,
    ) -> Turn:
        """A turn that has not begun, for a caller who drives it. params, tools, thinking_budget: in place of the assistant's
        own. begun: as of `Turn`."""
        config = self._config
        if thinking_budget is not None:
            config = config.with_changes(thinking_budget=thinking_budget)
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
            begun=begun,
        )


class Assistant(TurnMaker):
    """A model that answers conversations. It holds no conversation itself, and any number of turns may be under way."""

    def __init__(
        self,
        model: ChatModel,
        params: SamplingParams | None = None,
        tools: Sequence[Tool] = (),
        config: AssistantConfig | None = None,
    ) -> None:
        """params: of each message, as far as the model is of this machine. Raises ConfigError for two tools of a name, a tool
        format that there is not, and a thinking budget with a model that is not of this machine."""
        super().__init__(model.tokenizer, model.context_length, params, tools, config)
        self.model = model

    def turn(
        self, conversation: Conversation, principal: Principal = LOCAL, hooks: Sequence[Hook] = ()
    ) -> Generator[Event, None, None]:
        """Answer what the conversation ends with; its messages and tokens are extended by the turn's.

        Nothing begins before the first event is asked for; the last is a `TurnEnd`. Closed early, or interrupted, it keeps in
        the conversation what it has given out. Raises RequestError for a conversation that does not fit or has nothing to
        answer, and what the model raises; the conversation is then as before that round.
        """
        turn = self.start(conversation, principal, hooks)
        try:
            turn.begin()
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
