"""A served model with its adapters and additional models, and chats as turns of its engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from bessemer.assistant.assistant import TurnMaker
from bessemer.assistant.conversation import Conversation, with_system_in_place
from bessemer.assistant.hooks import Hook
from bessemer.assistant.messages import Message, TurnEnd, as_messages, with_call_ids
from bessemer.assistant.tools import Tool, ToolChoice
from bessemer.core.errors import RequestError
from bessemer.core.hashing import hash_value
from bessemer.inference.async_generation import ChoiceChunk
from bessemer.inference.engine import Engine
from bessemer.inference.images import PicturePrompt
from bessemer.inference.request import Completion, Prompt, Request
from bessemer.inference.sampling.params import SamplingParams
from bessemer.model.vision.preprocessing import Prepared
from bessemer.retrieval.answer import citation_form, fitting_sources, grounded
from bessemer.retrieval.long_documents import retrieved_from_itself
from bessemer.retrieval.summaries import Measure, Summarising, SummaryRequest, summarised
from bessemer.serving.config import ASIDE, ENCODED
from bessemer.serving.retrieval.annotations import ServedHit
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import Caller
from bessemer.serving.runtime.models import ModelPool, OpenModel
from bessemer.serving.runtime.pictures import prepared_pictures, text_of
from bessemer.serving.runtime.streams import unless_left
from bessemer.serving.runtime.worker import Turns, Worker
from bessemer.serving.runtime.worker import text_of as text_said

Result = TypeVar("Result")
#: Response header: the limit on an answer's tokens, where it is below the requested one; of several prompts, the lowest.
CLAMPED = "x-max-tokens"
#: Response header: tokens of the prompt that were left out (`context_overflow`); of several prompts, the most.
DROPPED = "x-dropped-tokens"
#: Response header: how many tokens less the model reads because of summaries (`context_overflow: summarise`).
SUMMARISED = "x-summarised-tokens"
#: Summaries that are remembered.
_SUMMARIES = 1024
#: Tokens that are left to an answer from sources whose client sets no limit.
_ANSWER_TOKENS = 512
#: Messages of a turn in which the server runs its own tools.
_MOST_ROUNDS = 8


class Summarised(NamedTuple):
    """A conversation with summaries by the model in place of what the context does not hold. tokens, read: of the conversation,
    and of what the model reads in its place."""

    messages: Sequence[Message]
    tokens: int
    read: int


@dataclass(frozen=True)
class Chat:
    """A conversation to answer, from any of the APIs.

    messages: in the form of chat completions. params_of: gives the sampling settings for a number of tokens of the answer.
    parameter_of: gives the request's parameter that an error's text is about. token_limit: the client's most tokens of an
    answer. priority: lower is more urgent. sources: passages that the answer is drawn from, the best first; None: of a chat
    without retrieval. takes_server_tools: whether the server's own tools may be called. continues: whether an assistant's
    message at the end is the beginning of the answer. summarised: what the model reads in place of the messages.
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
    priority: int = 0
    sources: Sequence[ServedHit] | None = None
    takes_server_tools: bool = True
    continues: bool = True
    summarised: Summarised | None = None

    @property
    def last_question(self) -> str:
        """The user's last message; "" where there is none."""
        return next((text_of(message["content"]) for message in reversed(self.messages) if message["role"] == "user"), "")


class Served:
    """A model under its name, and its adapters each under its own.

    aliases: other names of the model. pool: the additional models. hooks: run in every turn. server_tools: the tools that the
    server runs itself, given the user's last message.
    """

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        worker: Worker,
        aliases: Collection[str] = (),
        pool: ModelPool | None = None,
        hooks: Sequence[Hook] = (),
        server_tools: Callable[[str], Sequence[Tool]] | None = None,
    ) -> None:
        self.engine = engine
        self.model_name = model_name
        self.worker = worker
        self.aliases = tuple(aliases)
        self.pool = pool
        self.hooks = tuple(hooks)
        self.server_tools = server_tools
        #: Texts of earlier summaries, by the hash of what was summarised and for whom.
        self._summaries: dict[str, str] = {}
        self._side_work = asyncio.Semaphore(ASIDE.most)
        self._additional: WeakKeyDictionary[OpenModel, Served] = WeakKeyDictionary()
        context = engine.context_length if engine.context_shift is None else None
        self._turns = TurnMaker(engine.tokenizer, context)

    @property
    def names_of_model(self) -> tuple[str, ...]:
        """The names of the model without an adapter."""
        return (self.model_name, *self.aliases)

    @property
    def names(self) -> tuple[str, ...]:
        """The same, and the adapters that are loaded now."""
        return (*self.names_of_model, *self.engine.adapters)

    @property
    def all_names(self) -> tuple[str, ...]:
        """The same, and the additional models."""
        return (*self.names, *(() if self.pool is None else self.pool.names))

    def is_additional(self, name: str) -> bool:
        return self.pool is not None and name in self.pool.names

    @property
    def open_additional(self) -> Sequence[OpenModel]:
        return [] if self.pool is None else self.pool.open_models

    @property
    def requests(self) -> int:
        """API requests under way, those of additional models included."""
        return self.worker.requests + (0 if self.pool is None else self.pool.requests)

    async def model_for(self, name: str, caller: Caller) -> Served:
        """The model of a name. An additional one is loaded if need be, and stays open until the request of `caller` ends.

        Raises ApiError: 404 for an unknown name, 503 for a model that cannot be opened now.
        """
        caller.model = name
        if self.pool is not None and name in self.pool.names:
            caller.held.enter_context(self.pool.lease(name))
            model = await unless_left(caller.receive, self.pool.model(name))
            if model not in self._additional:
                self._additional[model] = Served(
                    model.engine, name, model.worker, hooks=self.hooks, server_tools=self.server_tools
                )
            return self._additional[model]
        self.check_model(name)
        return self

    async def run_in_thread(self, work: Callable[[], Result]) -> Result:
        """Run work that is no completion, a few at once, so that completions find threads."""
        async with self._side_work:
            return await asyncio.to_thread(work)

    def drain(self) -> None:
        """Begin nothing new, of any model."""
        self.worker.is_draining = True
        if self.pool is not None:
            self.pool.drain()

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
        """The adapter of that name; None for a name of the model."""
        return None if name in self.names_of_model else name

    def check_length(self, parameter: str, tokens: int, completion: int = 1) -> None:
        """Raises ApiError where a prompt and as many tokens of completion exceed the context."""
        context = self.engine.context_length
        if tokens + completion > context:
            raise ApiError(
                f"this model's context is {context} tokens, and the request has {tokens} in its {parameter}",
                parameter=parameter,
                code="context_length_exceeded",
            )

    def check_text(self, parameter: str, text: str) -> None:
        """Raises ApiError where a text certainly exceeds the context, or what is encoded of a text that may, before it is
        encoded."""
        if self.engine.context_shift is not None:
            check_encoded(text)
            return
        context = self.engine.context_length
        if len(text) > context and self.engine.tokenizer.has_more_tokens(text, context):
            raise ApiError(
                f"this model's context is {context} tokens, and the request has more in its {parameter}",
                parameter=parameter,
                code="context_length_exceeded",
            )

    def _check_conversation(self, chat: Chat, messages: Sequence[Message]) -> None:
        """`check_text` of a conversation with its tools as the chat template writes them. Raises RequestError as
        `render_chat`."""
        tools = [tool.description_in_chat for tool in chat.tools]
        if characters_of([chat.messages, tools]) <= self.engine.context_length:
            return
        inputs = [message.as_template_input() for message in messages]
        segments = self.engine.tokenizer.render_chat(inputs, add_generation_prompt=True, tools=tools or None)
        # a control token is one token, however many characters it has
        self.check_text("messages", "".join(segment.text for segment in segments if not segment.is_control))

    def most_tokens(self, parameter: str, tokens: int, wanted: int | None, caller: Caller) -> int:
        """The most tokens after a prompt: `wanted`, or what the context and the memory leave. A header tells the caller where
        that is less, and where a context shift leaves out some of the prompt. Raises as `check_length`, for one token where any
        is wanted."""
        shift = self.engine.context_shift
        if shift is not None and wanted != 0:
            if dropped := shift.dropped(tokens):
                caller.headers[DROPPED] = str(max(dropped, int(caller.headers.get(DROPPED, 0))))
            return shift.capacity - tokens + dropped if wanted is None else wanted
        self.check_length(parameter, tokens, 0 if wanted == 0 else 1)
        left = max(1, self.engine.longest - tokens)
        if wanted is None:
            return left
        if wanted > left:
            caller.headers[CLAMPED] = str(min(left, int(caller.headers.get(CLAMPED, left))))
        return min(wanted, left)

    def check_unguarded(self) -> None:
        """Raises ApiError (403) where guardrails are on, for endpoints that no hook checks."""
        if self.hooks:
            raise ApiError("this server checks what is said, and answers conversations alone", status=403, code="not_allowed")

    async def start(self, make: Callable[[], Chat]) -> Turns:
        """Begin the turns of a chat, off the event loop; first its summaries, where the context does not hold it and the engine
        is to do so. make: gives the chat. Raises ApiError as `begin`, as `Turns.finish`, and where the client leaves."""
        chat = await asyncio.to_thread(make)
        if self.engine.config.context_overflow == "summarise":
            chat = await unless_left(chat.caller.receive, self._with_summaries(chat))
        return await asyncio.to_thread(self.begin, chat)

    def begin(self, chat: Chat) -> Turns:
        """Begin the turns of a chat: encode the conversation and check everything. Call it off the event loop.

        Raises ApiError for what is wrong with the request.
        """
        sources: Sequence[ServedHit] | None = None
        chat = self._with_server_tools(chat)
        pictures: list[Prepared] = []

        def params_of(prompt_tokens: int) -> SamplingParams:
            prompt_tokens += self._added_tokens(pictures)
            params = chat.params_of(self.most_tokens("messages", prompt_tokens, chat.token_limit, chat.caller))
            # a form that the client asks for takes the place of the citations'
            return params if sources is None or params.grammar else params.with_changes(**citation_form(sources))

        salt = chat.caller.salt(chat.cache_salt)

        def prepare(tokens: Sequence[int], params: SamplingParams) -> Request:
            adapter, priority = self.adapter(chat.model), chat.priority
            prompt: Prompt = PicturePrompt(list(tokens), pictures) if pictures else list(tokens)
            return self.engine.prepare(prompt, params, priority=priority, adapter=adapter, cache_salt=salt)

        turns, begun = [], []
        try:
            messages, answer_prefix = self._read(chat)
            if chat.summarised is not None:
                messages = list(chat.summarised.messages)
            pictures += prepared_pictures(chat.messages, self.engine)
            messages = self._retrieved_from_itself(chat, messages)
            self._check_conversation(chat, messages)
            if chat.sources is not None:
                messages, sources = self._grounded(chat, messages, chat.sources)
            conversation = Conversation(messages, follows_assistant=not chat.continues)
            if chat.answers > 1 and not self.hooks:
                # encoded once for all answers; hooks may add to each turn's conversation
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
                    # clients run their tools, so a turn ends with its first message; the server's are run in rounds
                    max_rounds=_MOST_ROUNDS if any(tool.function is not None for tool in chat.tools) else 1,
                    answer_prefix=answer_prefix,
                )
                begun.append(turn.begin(params_of))
                turns.append(turn)
            made = Turns(turns, prepare, chat.caller, self.worker, sources, begun)
            if chat.summarised is not None:
                made.summarised = {"tokens": chat.summarised.tokens, "read_tokens": chat.summarised.read}
            return made
        except RequestError as error:
            reason, parameter = str(error), chat.parameter_of(str(error))
            if parameter is None and chat.tools and reason.startswith("ebnf"):
                # a message's grammar contains the tools' schemas
                parameter, reason = "tools", f"tools: calls cannot be held to their schemas: {reason}"
            raise ApiError(reason, parameter=parameter or "messages", code="invalid_value") from None

    def _retrieved_from_itself(self, chat: Chat, messages: list[Message]) -> list[Message]:
        """The conversation, with passages in place of texts that the context does not hold, where the engine is to do so. A
        header tells the caller how many tokens were left out. Raises ApiError as `check_encoded`."""
        tokenizer, tools = self.engine.tokenizer, [tool.description_in_chat for tool in chat.tools] or None
        if self.engine.config.context_overflow != "retrieve" or characters_of([chat.messages, tools]) <= self.engine.longest:
            return messages
        check_encoded([chat.messages, tools])
        answer_tokens = min(chat.token_limit or _ANSWER_TOKENS, self.engine.longest // 2)

        def tokens_of(messages: Sequence[Message]) -> int:
            inputs = [message.as_template_input() for message in messages]
            return len(tokenizer.apply_chat_template(inputs, add_generation_prompt=True, tools=tools))

        found = retrieved_from_itself(messages, lambda some: tokens_of(some) + answer_tokens <= self.engine.longest)
        if found.omitted:
            chat.caller.headers[DROPPED] = str(tokens_of(messages) - tokens_of(found.messages))
        return found.messages

    async def _with_summaries(self, chat: Chat) -> Chat:
        """The chat, with summaries in place of what the context does not hold. A header says how many tokens they save. Raises
        as `_summary`."""
        chat = await asyncio.to_thread(self._with_server_tools, chat)
        tools = [tool.description_in_chat for tool in chat.tools] or None
        if characters_of([chat.messages, tools]) <= self.engine.longest:
            return chat
        check_encoded([chat.messages, tools])
        try:
            messages, answer_prefix = await asyncio.to_thread(self._read, chat)
        except RequestError:
            # `begin` says what is wrong
            return chat
        measure = self._measure(chat, tools, answer_prefix)
        work = summarised(messages, measure)
        written: str | None = None
        while True:
            try:
                step = await asyncio.to_thread(_next_request, work, written)
            except RequestError:
                return chat
            if not isinstance(step, SummaryRequest):
                break
            written = await self._summary(chat, step)
        if step == messages:
            return chat
        tokens, read = await asyncio.to_thread(lambda: (measure.of_messages(messages), measure.of_messages(step)))
        summary = Summarised(step, tokens, read)
        chat.caller.headers[SUMMARISED] = str(tokens - read)
        return replace(chat, summarised=summary)

    def _measure(self, chat: Chat, tools: list[dict[str, Any]] | None, answer_prefix: Message | None) -> Measure:
        """How long a chat may be, beside its answer, its beginning and the first of its sources."""
        tokenizer, longest = self.engine.tokenizer, self.engine.longest
        answer_tokens = min(chat.token_limit or _ANSWER_TOKENS, longest // 2)

        def of_text(text: str) -> int:
            return len(tokenizer.encode(text, add_bos=False))

        def tokens_of(messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> int:
            inputs = [message.as_template_input() for message in messages]
            return len(tokenizer.apply_chat_template(inputs, add_generation_prompt=True, tools=tools))

        def of_messages(messages: Sequence[Message]) -> int:
            if chat.sources:
                narrow = [chat.sources[0].narrowed]
                messages = with_system_in_place(grounded(messages, narrow), tokenizer)
            return tokens_of(messages, tools)

        budget = longest - answer_tokens - (0 if answer_prefix is None else of_text(answer_prefix.text))
        return Measure(of_messages, lambda message: tokens_of([message], None), of_text, budget, longest)

    async def _summary(self, chat: Chat, request: SummaryRequest) -> str:
        """A summary by the model that answers, which hooks check as any answer. What was summarised before for the same client
        is not computed again. Raises ApiError as `begin` and `Turns.finish`, and where a hook refuses the text."""
        salt = chat.caller.salt(chat.cache_salt)
        key = hash_value([salt, chat.model, request.message.text, request.most_tokens])
        if (known := self._summaries.pop(key, None)) is None:
            part = Chat(
                chat.caller,
                chat.model,
                [request.message.as_template_input()],
                lambda most: SamplingParams(max_tokens=most, temperature=0),
                lambda reason: "messages",
                token_limit=request.most_tokens,
                thinking_budget=0,
                cache_salt=chat.cache_salt,
                priority=chat.priority,
                takes_server_tools=False,
                summarised=Summarised([request.message], 0, 0),
            )
            turns = await asyncio.to_thread(self.begin, part)
            step = await turns.finish()
            ends = [event for _, events, *_ in step for event in events if isinstance(event, TurnEnd)]
            if any(end.reason == "refused" for end in ends):
                raise ApiError(
                    f"messages: a part cannot be summarised: {text_said(step)}", parameter="messages", code="refused"
                )
            known = text_said(step).strip()
        # the latest last
        self._summaries[key] = known
        if len(self._summaries) > _SUMMARIES:
            del self._summaries[next(iter(self._summaries))]
        return known

    def _grounded(
        self, chat: Chat, messages: Sequence[Message], found: Sequence[ServedHit]
    ) -> tuple[list[Message], Sequence[ServedHit]]:
        """The conversation with the first of the passages that leave room for the answer, at least one, and these. Raises
        RequestError for one without a user's message."""
        tokenizer, tools = self.engine.tokenizer, [tool.description_in_chat for tool in chat.tools] or None
        answer_tokens = min(chat.token_limit or _ANSWER_TOKENS, self.engine.longest // 2)

        def with_sources(sources: Sequence[ServedHit]) -> list[Message]:
            return with_system_in_place(grounded(messages, sources), tokenizer)

        def fits(sources: Sequence[ServedHit]) -> bool:
            inputs = [message.as_template_input() for message in with_sources(sources)]
            tokens = len(tokenizer.apply_chat_template(inputs, add_generation_prompt=True, tools=tools))
            return tokens + answer_tokens <= self.engine.longest

        used = fitting_sources(found, fits)
        return with_sources(used), used

    def count(self, chat: Chat) -> int:
        """The tokens of a conversation with its tools, up to where the assistant speaks. Raises as `begin`."""
        chat = self._with_server_tools(chat)
        tools = [tool.description_in_chat for tool in chat.tools] or None
        check_encoded([chat.messages, tools])
        messages, answer_prefix = self._read(chat)
        inputs = [message.as_template_input() for message in messages]
        tokenizer = self.engine.tokenizer
        prefix_ids = [] if answer_prefix is None else tokenizer.encode(answer_prefix.text, add_bos=False)
        tokens = len(tokenizer.apply_chat_template(inputs, add_generation_prompt=True, tools=tools)) + len(prefix_ids)
        return tokens + self._added_tokens(prepared_pictures(chat.messages, self.engine))

    def _added_tokens(self, pictures: Sequence[Prepared]) -> int:
        """Tokens that pictures take beyond the one that stands for each in a rendered conversation."""
        reader = self.engine.pictures
        return 0 if reader is None else sum(len(reader.tokens(one)) - 1 for one in pictures)

    def _with_server_tools(self, chat: Chat) -> Chat:
        """The chat with the tools that the server runs, apart from those whose name a client's tool has."""
        if self.server_tools is None or not chat.takes_server_tools:
            return chat
        taken = {tool.name for tool in chat.tools}
        own = [tool for tool in self.server_tools(chat.last_question) if tool.name not in taken]
        return replace(chat, tools=(*chat.tools, *own))

    def _read(self, chat: Chat) -> tuple[list[Message], Message | None]:
        """The messages for the chat template, and the beginning of the answer: the assistant's message at the end, as in
        Anthropic's API, and in vLLM's with `continue_final_message`."""
        messages = as_messages(chat.messages)
        is_begun = chat.continues and messages[-1].role == "assistant" and not messages[-1].calls
        prefix = messages.pop() if is_begun else None
        messages = with_call_ids(with_system_in_place(messages, self.engine.tokenizer))
        return messages, prefix if prefix is not None and prefix.text else None


def _next_request(work: Summarising, written: str | None) -> SummaryRequest | list[Message]:
    """What is to be summarised next, given the summary before; in the end the conversation."""
    try:
        return next(work) if written is None else work.send(written)
    except StopIteration as ended:
        messages: list[Message] = ended.value
        return messages


def characters_of(value: Any) -> int:
    """The characters of all strings in a value of JSON, without the keys."""
    characters, left = 0, [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            characters += len(value)
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, Sequence):
            left += value
    return characters


def check_encoded(value: Any) -> None:
    """Raises ApiError for more text than one request may have encoded without a completion."""
    if (characters := characters_of(value)) > ENCODED.most:
        raise ApiError(
            f"the request has {characters:,} characters, of which at most {ENCODED.most:,} are encoded", code="invalid_value"
        )


@dataclass(frozen=True)
class TextWork:
    """A prompt that the model continues as plain text."""

    served: Served
    caller: Caller
    request: Request
    params: SamplingParams

    async def finish(self) -> list[Completion]:
        return await self.served.worker.complete([self.request], self.params, self.caller)

    def stream(self) -> AsyncGenerator[list[ChoiceChunk], None]:
        return self.served.worker.chunks([self.request], self.caller)
