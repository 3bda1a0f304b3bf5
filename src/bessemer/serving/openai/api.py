"""OpenAI's API below `/v1`: chat and plain completions, embeddings, and the list of models.

An embedding is the mean of the last hidden states of a text, of length 1.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, Field
from torch import Tensor

from bessemer.core.errors import BessemerError, ConfigError, RequestError
from bessemer.inference.request import Request as EngineRequest
from bessemer.inference.sampling.params import SamplingParams
from bessemer.serving import config as limits
from bessemer.serving.openai.protocol import ChatRequest, CompletionRequest, GenerationRequest, prompts_of
from bessemer.serving.openai.replies import ChatReply, CompletionReply, Echo
from bessemer.serving.openai.tools import choice_of, tools_of
from bessemer.serving.runtime.bodies import ApiError, Body, Name, read_body
from bessemer.serving.runtime.clients import Caller, caller_of
from bessemer.serving.runtime.served import Chat, Served
from bessemer.serving.runtime.streams import EventStream, as_api_error, event_data, made_beside, until_client_leaves
from bessemer.serving.runtime.worker import Turns
from bessemer.tokenization.prompts import infill_prompt


class EmbeddingsRequest(Body):
    """The body of `/v1/embeddings`. dimensions: that of the model, where it is said."""

    model: Name
    input: Annotated[list[str] | list[list[int]], BeforeValidator(prompts_of)] = Field(max_length=limits.EMBEDDED.most)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)


def embeddings_reply(asked: EmbeddingsRequest, vectors_ND: Tensor, prompts: Sequence[Sequence[int]]) -> Response:
    """The response. prompts: the tokens of each text. Raises ApiError for another dimension than the model's."""
    width = vectors_ND.shape[1]
    if asked.dimensions not in (None, width):
        raise ApiError(
            f"'dimensions' must be {width}, the width of this model, got {asked.dimensions}",
            parameter="dimensions",
            code="invalid_value",
        )
    tokens = sum(map(len, prompts))
    # a vector at a time: to write millions of numbers at once keeps other threads from running
    data = ",".join(
        json.dumps({"object": "embedding", "index": index, "embedding": _in_form(vector_D, asked.encoding_format)})
        for index, vector_D in enumerate(vectors_ND)
    )
    rest = json.dumps({"model": asked.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return Response(f'{{"object": "list", "data": [{data}], {rest[1:]}', media_type="application/json")


def _in_form(vector_D: Tensor, form: str) -> list[float] | str:
    """Numbers, or the bytes of little-endian float32 in base64, for which OpenAI's clients ask."""
    if form == "float":
        numbers: list[float] = vector_D.tolist()
        return numbers
    return base64.b64encode(vector_D.numpy().astype("<f4").tobytes()).decode()


#: What OpenAI's list of models once said of each, and vLLM's still does: it can be asked, and not trained.
_PERMISSION: dict[str, Any] = {
    "object": "model_permission",
    "allow_create_engine": False,
    "allow_sampling": True,
    "allow_logprobs": True,
    "allow_search_indices": False,
    "allow_view": True,
    "allow_fine_tuning": False,
    "organization": "*",
    "group": None,
    "is_blocking": False,
}


@dataclass(frozen=True)
class _Prepared:
    """Engine requests that have not begun, one for each prompt, and the response to them. params: of the first; those of the
    others differ in the most tokens alone."""

    served: Served
    caller: Caller
    requests: Sequence[EngineRequest]
    params: SamplingParams
    reply: CompletionReply

    def usage_event(self) -> dict[str, Any]:
        """The event that tells the tokens that were taken."""
        return self.reply.usage_event(sum(request.cached_tokens for request in self.requests))


@dataclass
class OpenAIApi:
    """The routes below `/v1` and what they share."""

    served: Served
    started: int = field(default_factory=lambda: int(time.time()))

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1")
        router.add_api_route("/models", self.models, methods=["GET"])
        router.add_api_route("/models/{name:path}", self.model, methods=["GET"])
        router.add_api_route("/chat/completions", self.chat, methods=["POST"], response_model=None)
        router.add_api_route("/completions", self.complete, methods=["POST"], response_model=None)
        router.add_api_route("/embeddings", self.embed, methods=["POST"], response_model=None)
        return router

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self.model(name) for name in self.served.all_names]}

    async def model(self, name: str) -> dict[str, Any]:
        self.served.check_model(name)
        shelf = self.served.shelf
        is_beside = shelf is not None and name in shelf.names
        # of a model beside the first, what is known while it is open
        engine = self.served.engine if not is_beside else None
        if shelf is not None and is_beside:
            engine = next((one.engine for one in shelf.open_models if one.name == name), None)
        is_adapter = not is_beside and self.served.adapter(name) is not None
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "bessemer",
            # an adapter's base; the root is a name and no path of this machine
            "root": name if is_beside else self.served.model_name,
            "parent": self.served.model_name if is_adapter else None,
            # as vLLM calls the context
            "max_model_len": None if engine is None else engine.context_length,
            "permission": [{**_PERMISSION, "id": f"modelperm-{name}", "created": self.started}],
        }

    async def chat(self, request: Request) -> Response:
        asked = await read_body(ChatRequest, request)
        caller = caller_of(request)
        served = await self.served.of(asked.model, caller)
        with ExitStack() as held:
            # 503 before any work
            held.enter_context(served.worker.admit(asked.n))
            turns = await asyncio.to_thread(_begin_turns, served, asked, caller)
            reply = ChatReply(
                asked.model,
                served.engine.tokenizer,
                turns,
                n=asked.n,
                log_probs=asked.logprobs,
                shows_thinking=asked.include_reasoning,
                shows_ids=asked.return_token_ids,
            )
            if not asked.stream:
                return await until_client_leaves(request, self._whole_chat(served, turns, reply, caller))
            news = self._told(served, turns, reply, held.pop_all())
            # from here on, the generator holds the admission
            await anext(news)
            usage = reply.usage_event if asked.wants_usage else None
            return EventStream(_events(news, usage), caller.headers)

    async def complete(self, request: Request) -> Response:
        asked = await read_body(CompletionRequest, request)
        caller = caller_of(request)
        self.served.check_unguarded()
        served = await self.served.of(asked.model, caller)
        with ExitStack() as held:
            held.enter_context(served.worker.admit(len(asked.prompt) * asked.answers))
            prepared = await asyncio.to_thread(_prepare, served, asked, caller)
            if not asked.stream:
                return await until_client_leaves(request, self._whole(prepared))
            news = self._chunks(prepared, held.pop_all())
            await anext(news)
            usage = prepared.usage_event if asked.wants_usage else None
            return EventStream(_events(news, usage), caller.headers)

    async def embed(self, request: Request) -> Response:
        asked = await read_body(EmbeddingsRequest, request)
        caller = caller_of(request)
        served = await self.served.of(asked.model, caller)
        # no more of them are computed at once
        with served.worker.admit(min(len(asked.input), served.engine.max_num_seqs)):
            return await asyncio.to_thread(_embeddings, served, asked, caller)

    async def _whole_chat(self, served: Served, turns: Turns, reply: ChatReply, caller: Caller) -> Response:
        told = await turns.finish(served.worker)
        # each token may have twenty others beside it
        if reply.tells_log_probs:
            return await made_beside(lambda: reply.whole(told), caller.headers)
        return JSONResponse(reply.whole(told), headers=caller.headers)

    async def _told(
        self, served: Served, turns: Turns, reply: ChatReply, place: AbstractContextManager
    ) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The events of a chat's stream, as of `_chunks`."""
        with place:
            yield []
            async with aclosing(turns.stream(served.worker)) as news:
                async for told in news:
                    yield list(reply.events(told))

    async def _whole(self, prepared: _Prepared) -> Response:
        completions = await prepared.served.worker.complete(prepared.requests, prepared.params, prepared.caller)
        reply, headers = prepared.reply, prepared.caller.headers
        if reply.tells_log_probs:
            return await made_beside(lambda: reply.whole(completions), headers)
        return JSONResponse(reply.whole(completions), headers=headers)

    async def _chunks(self, prepared: _Prepared, place: AbstractContextManager) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The events of a stream. The first item is an empty list, given at once: from then on closing or cancelling it ends
        the requests and their admission."""
        with place:
            yield []
            async with aclosing(prepared.served.worker.chunks(prepared.requests, prepared.caller)) as news:
                async for chunks in news:
                    # by its first chunk, all log-probabilities of a prompt are there
                    yield list(prepared.reply.events(chunks, [request.prompt_log_probs for request in prepared.requests]))


def _begin_turns(served: Served, asked: ChatRequest, caller: Caller) -> Turns:
    """Turns that have begun, off the event loop."""
    chat = Chat(
        caller,
        asked.model,
        [message.as_template_input() for message in asked.messages],
        asked.sampling,
        asked.parameter_in,
        token_limit=asked.token_limit,
        tools=[] if asked.tool_choice == "none" else tools_of(asked.tools),
        choice=choice_of(asked.tool_choice, asked.parallel_tool_calls),
        thinking_budget=asked.budget,
        answers=asked.n,
        cache_salt=asked.cache_salt,
    )
    return served.begin(chat)


def _embeddings(served: Served, asked: EmbeddingsRequest, caller: Caller) -> Response:
    names = ["input"] if len(asked.input) == 1 else [f"input[{place}]" for place in range(len(asked.input))]
    given: Sequence[str | list[int]] = asked.input
    prompts = [_tokens(served, name, one, None) for name, one in zip(names, given, strict=True)]
    for name, tokens in zip(names, prompts, strict=True):
        served.check_length(name, len(tokens), 0)
    caller.spend(prompt=sum(map(len, prompts)))
    # in parts, between which other requests get their turn
    size, adapter = served.engine.max_num_seqs, served.adapter(asked.model)
    parts = [served.engine.embed(prompts[start : start + size], adapter=adapter) for start in range(0, len(prompts), size)]
    return embeddings_reply(asked, torch.cat(parts), prompts)


def _prepare(served: Served, asked: CompletionRequest, caller: Caller) -> _Prepared:
    """Read the prompts and check all that can be checked, off the event loop."""
    tokenizer = served.engine.tokenizer
    texts_or_ids: Sequence[str | list[int]] = asked.prompt
    names = ["prompt"] if len(texts_or_ids) == 1 else [f"prompt[{place}]" for place in range(len(texts_or_ids))]
    prompts = {name: _tokens(served, name, given, asked.suffix) for name, given in zip(names, texts_or_ids, strict=True)}
    echoes = [
        Echo(given if isinstance(given, str) else tokenizer.decode(tokens), tokens) if asked.echo else None
        for given, tokens in zip(texts_or_ids, prompts.values(), strict=True)
    ]
    assert asked.token_limit is not None
    limits = [served.most_tokens(name, len(tokens), asked.token_limit, caller) for name, tokens in prompts.items()]
    params = [asked.sampling(limit) for limit in limits]
    with _refusals(asked):
        requests = [
            _request(served, asked, tokens, its_params, caller)
            for tokens, its_params in zip(prompts.values(), params, strict=True)
        ]
    reply = CompletionReply(
        asked.model,
        tokenizer,
        sum(map(len, prompts.values())),
        log_probs=asked.wants_log_probs,
        echoes=echoes,
        n=asked.n,
        prompt_ids=list(prompts.values()) if asked.return_token_ids else None,
    )
    return _Prepared(served, caller, requests, params[0], reply)


def _request(
    served: Served, asked: GenerationRequest, tokens: Sequence[int], params: SamplingParams, caller: Caller
) -> EngineRequest:
    adapter = served.adapter(asked.model)
    return served.engine.prepare(list(tokens), params, adapter=adapter, cache_salt=caller.salt(asked.cache_salt))


def _tokens(served: Served, name: str, given: str | list[int], suffix: str | None) -> list[int]:
    """The tokens of a plain completion's prompt, which the parameter `name` gives; suffix: what is to stand behind it."""
    tokenizer = served.engine.tokenizer
    if suffix is not None:
        assert isinstance(given, str), "the protocol sees to it"
        served.check_text(name, given + suffix)
        return _infill_tokens(served, given, suffix)
    if isinstance(given, str):
        served.check_text(name, given)
    tokens = tokenizer.encode(given) if isinstance(given, str) else given
    if tokens and all(0 <= token < tokenizer.vocab_size for token in tokens):
        return tokens
    raise ApiError(
        f"invalid '{name}': its tokens must be at least one, with ids in 0 … {tokenizer.vocab_size - 1}",
        parameter=name,
        code="invalid_value",
    )


def _infill_tokens(served: Served, prefix: str, suffix: str) -> list[int]:
    try:
        return infill_prompt(served.engine.tokenizer, prefix, suffix)
    except ConfigError as error:
        raise ApiError(f"suffix: {error}", parameter="suffix", code="unsupported_parameter") from None


@contextmanager
def _refusals(asked: GenerationRequest) -> Iterator[None]:
    """What the engine refuses, as the API's error about the parameter that it names."""
    try:
        yield
    except RequestError as error:
        raise ApiError(str(error), parameter=asked.parameter_in(str(error)), code="invalid_value") from None


async def _events(
    news: AsyncGenerator[list[dict[str, Any]], None], usage: Callable[[], dict[str, Any]] | None
) -> AsyncIterator[str]:
    """The server-sent events of a stream. With usage every event has the key, and one more before the end fills it."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {event_data(body if usage is None else {'usage': None, **body})}\n\n"

    async with aclosing(news):
        try:
            async for bodies in news:
                if bodies:
                    yield "".join(map(event, bodies))
        except (BessemerError, ApiError) as error:
            # the status is long sent, so it is an event, as OpenAI's clients expect
            yield event(as_api_error(error).body())
            return
    if usage is not None:
        yield event(usage())
    yield "data: [DONE]\n\n"
