"""What the APIs share of a server: a model, its adapters, and the answers to a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from bessemer.assistant.assistant import TurnMaker
from bessemer.assistant.config import AssistantConfig
from bessemer.assistant.conversation import Conversation
from bessemer.assistant.hooks import Hook
from bessemer.assistant.messages import Message, as_messages, with_system_first
from bessemer.assistant.tools import Tool, ToolChoice
from bessemer.core.errors import RequestError
from bessemer.inference.request import Request
from bessemer.inference.sampling.params import SamplingParams
from bessemer.serving import config as limits
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import Caller
from bessemer.serving.runtime.models import OpenModel, Shelf
from bessemer.serving.runtime.worker import TextEngine, Turns, Worker

Result = TypeVar("Result")
#: The header that tells the most tokens of an answer where a request asks for more than there is room for; of several prompts,
#: the least.
CLAMPED = "x-max-tokens"


@dataclass(frozen=True)
class Chat:
    """A conversation that is to be answered.

    caller: whose request it is. messages: in the form of chat completions. params_of: how answers are sampled, given the most
    tokens of one. token_limit: the most that the client says. parameter_of: which parameter of the request a refusal is about,
    by its text. answers: how many.
    """

    caller: Caller
    model: str
    messages: Sequence[Mapping[str, Any]]
    params_of: Callable[[int], SamplingParams]
    parameter_of: Callable[[str], str | None]
    token_limit: int | None = None
    tools: Sequence[Tool] = ()
    choice: ToolChoice = field(default_factory=ToolChoice)
    thinking_budget: int | None = None
    answers: int = 1
    cache_salt: str | None = None


class Served:
    """A model under its name, and its adapters each under its own.

    aliases: other names of the model. shelf: of the first model, those beside it. hooks: what looks at every turn.
    """

    def __init__(
        self,
        engine: TextEngine,
        model_name: str,
        worker: Worker,
        aliases: Collection[str] = (),
        shelf: Shelf | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.engine = engine
        self.model_name = model_name
        self.worker = worker
        self.aliases = tuple(aliases)
        self.shelf = shelf
        self.hooks = tuple(hooks)
        self._aside = asyncio.Semaphore(limits.ASIDE.most)
        self._beside: WeakKeyDictionary[OpenModel, Served] = WeakKeyDictionary()
        # tools are the clients' to run: what a message calls wrongly is theirs to answer too
        config = AssistantConfig(max_rounds=1)
        self._turns = TurnMaker(engine.tokenizer, engine.context_length, config=config)

    @property
    def names_of_model(self) -> tuple[str, ...]:
        """The names of the model as it is."""
        return (self.model_name, *self.aliases)

    @property
    def names(self) -> tuple[str, ...]:
        """What a request may ask for: the model as it is, and with each adapter that is loaded now."""
        return (*self.names_of_model, *self.engine.adapters)

    @property
    def all_names(self) -> tuple[str, ...]:
        """The same with the models beside it."""
        return (*self.names, *(() if self.shelf is None else self.shelf.names))

    @property
    def requests(self) -> int:
        """API requests under way, of the models beside it too."""
        return self.worker.requests + (0 if self.shelf is None else self.shelf.requests)

    async def of(self, name: str, caller: Caller) -> Served:
        """What serves a name: this model, or one beside it, opened if it must be, and open until the request of `caller` ends.

        Raises ApiError: 404 for a name that is not served, 503 for a model that cannot be opened now.
        """
        caller.model = name
        if self.shelf is not None and name in self.shelf.names:
            caller.held.enter_context(self.shelf.lease(name))
            found = await self.shelf.model(name)
            if found not in self._beside:
                self._beside[found] = Served(found.engine, name, found.worker, hooks=self.hooks)
            return self._beside[found]
        self.check_model(name)
        return self

    async def aside(self, work: Callable[[], Result]) -> Result:
        """The result of work that is no completion, on a thread. Few at once, so that completions find threads."""
        async with self._aside:
            return await asyncio.to_thread(work)

    def drain(self) -> None:
        """Begin nothing new, of any model."""
        self.worker.is_draining = True
        if self.shelf is not None:
            self.shelf.drain()

    def check_model(self, name: str) -> None:
        """Raises ApiError (404) for a name that is not served."""
        if name not in self.all_names:
            known = ", ".join(f"'{known}'" for known in self.all_names)
            raise ApiError(
                f"the model '{name}' does not exist; this server has {known}",
                status=404,
                parameter="model",
                code="model_not_found",
            )

    def adapter(self, name: str) -> str | None:
        """The adapter that a name asks for; None: the model as it is."""
        return None if name == self.model_name or name in self.aliases else name

    def check_length(self, parameter: str, tokens: int, behind: int = 1) -> None:
        """Raises ApiError where a prompt and as many tokens behind it are more than the context."""
        context = self.engine.context_length
        if tokens + behind > context:
            raise ApiError(
                f"this model's context is {context} tokens, and the request has {tokens} in its {parameter}",
                parameter=parameter,
                code="context_length_exceeded",
            )

    def check_text(self, parameter: str, text: str) -> None:
        """Raises ApiError where a text surely is more than the context, before it is encoded."""
        context = self.engine.context_length
        if len(text) > context and self.engine.tokenizer.has_more_tokens(text, context):
            raise ApiError(
                f"this model's context is {context} tokens, and the request has more in its {parameter}",
                parameter=parameter,
                code="context_length_exceeded",
            )

    def _check_conversation(self, chat: Chat, messages: Sequence[Message]) -> None:
        """The same of a conversation with its tools, as the model would read it. Raises RequestError as `render_chat`."""
        tools = [tool.description_in_chat for tool in chat.tools]
        if characters_of([chat.messages, tools]) <= self.engine.context_length:
            return
        given = [message.as_template_input() for message in messages]
        segments = self.engine.tokenizer.render_chat(given, add_generation_prompt=True, tools=tools or None)
        # a control token is one, however it is written
        self.check_text("messages", "".join(segment.text for segment in segments if not segment.is_control))

    def most_tokens(self, parameter: str, tokens: int, wanted: int | None, caller: Caller) -> int:
        """The most tokens behind a prompt: those that are wanted, or what there is room for in the context and the memory.
        A header tells the caller where that is fewer. Raises as `check_length`, of a single token where any is wanted."""
        self.check_length(parameter, tokens, 0 if wanted == 0 else 1)
        left = max(1, self.engine.longest - tokens)
        if wanted is None:
            return left
        if wanted > left:
            caller.headers[CLAMPED] = str(min(left, int(caller.headers.get(CLAMPED, left))))
        return min(wanted, left)

    def check_unguarded(self) -> None:
        """Raises ApiError (403) for text that passes no hook, where there are hooks: a guard that can be walked around is
        none."""
        if self.hooks:
            raise ApiError("this server checks what is said, and answers conversations alone", status=403, code="not_allowed")

    def begin(self, chat: Chat) -> Turns:
        """Turns that have begun, for a thread beside the event loop: the conversation is read, and all checked that can be.

        Raises ApiError for what is wrong with the request.
        """

        def params_of(prompt_tokens: int) -> SamplingParams:
            return chat.params_of(self.most_tokens("messages", prompt_tokens, chat.token_limit, chat.caller))

        salt = chat.caller.salt(chat.cache_salt)

        def request(tokens: Sequence[int], params: SamplingParams) -> Request:
            return self.engine.prepare(list(tokens), params, adapter=self.adapter(chat.model), cache_salt=salt)

        turns = []
        try:
            messages, begun = self._read(chat)
            self._check_conversation(chat, messages)
            conversation = Conversation(messages)
            if chat.answers > 1 and not self.hooks:
                # read once for all answers; a hook may add to what is read
                conversation.offer([tool.description_in_chat for tool in chat.tools])
                conversation.encode(self.engine.tokenizer)
            for _ in range(chat.answers):
                turn = self._turns.start(
                    conversation.fork(),
                    chat.caller.client.principal,
                    self.hooks,
                    tools=chat.tools,
                    tool_choice=chat.choice,
                    thinking_budget=chat.thinking_budget,
                    begun=begun,
                )
                turn.begin(params_of)
                turns.append(turn)
            return Turns(turns, request, chat.caller)
        except RequestError as error:
            reason, parameter = str(error), chat.parameter_of(str(error))
            if parameter is None and chat.tools and reason.startswith("ebnf"):
                # the grammar of a message is made of the tools' schemas
                parameter, reason = "tools", f"tools: calls cannot be held to their schemas: {reason}"
            raise ApiError(reason, parameter=parameter or "messages", code="invalid_value") from None

    def count(self, chat: Chat) -> int:
        """The tokens of a conversation with its tools, up to where the assistant speaks. Raises as `begin`."""
        tools = [tool.description_in_chat for tool in chat.tools] or None
        check_encoded([chat.messages, tools])
        messages, begun = self._read(chat)
        inputs = [message.as_template_input() for message in messages]
        tokenizer = self.engine.tokenizer
        more = [] if begun is None else tokenizer.encode(begun.text, add_bos=False)
        return len(tokenizer.apply_chat_template(inputs, add_generation_prompt=True, tools=tools)) + len(more)

    def _read(self, chat: Chat) -> tuple[list[Message], Message | None]:
        """A conversation that the chat template takes, and what the answer begins with: the assistant's message at its end, as
        Anthropic has it, and vLLM with `continue_final_message`."""
        messages = as_messages(chat.messages)
        begun = messages.pop() if messages[-1].role == "assistant" and not messages[-1].calls else None
        if any(message.role == "system" for message in messages[1:]) and not self._takes_system_anywhere:
            messages = with_system_first(messages)
        return messages, begun if begun is not None and begun.text else None

    @cached_property
    def _takes_system_anywhere(self) -> bool:
        """Whether the chat template writes a system message that is not the first: some refuse it, and some leave it out."""
        first, later = {"role": "system", "content": "first"}, {"role": "system", "content": "later"}
        user = {"role": "user", "content": "question"}
        tokenizer = self.engine.tokenizer
        try:
            ids = tokenizer.apply_chat_template([first, user, later], add_generation_prompt=True)
        except RequestError:
            return False
        text = tokenizer.decode(ids)
        return text.find("question") < text.find("later")


def characters_of(value: Any) -> int:
    """The characters of all texts in a value of JSON."""
    characters, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            characters += len(one)
        elif isinstance(one, Mapping):
            left += one.values()
        elif isinstance(one, Sequence):
            left += one
    return characters


def check_encoded(value: Any) -> None:
    """Raises ApiError for more text than is encoded for its own sake."""
    if (characters := characters_of(value)) > limits.ENCODED.most:
        raise ApiError(
            f"the request has {characters:,} characters, of which at most {limits.ENCODED.most:,} are encoded",
            code="invalid_value",
        )
