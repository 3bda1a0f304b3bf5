"""OpenAI's API below `/v1`: chat and plain completions, embeddings, and the list of models.

An embedding is the mean of the last hidden states of a text, of length 1.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field
from torch import Tensor

from bessemer.core.errors import ConfigError, RequestError
from bessemer.inference.async_generation import ChoiceChunk
from bessemer.inference.request import Completion
from bessemer.inference.request import Request as EngineRequest
from bessemer.inference.sampling.params import SamplingParams
from bessemer.retrieval.citations import Entails
from bessemer.serving.config import EMBEDDED
from bessemer.serving.openai.protocol import ChatRequest, CompletionRequest, GenerationRequest, prompts_of
from bessemer.serving.openai.replies import ChatReply, CompletionReply, Echo
from bessemer.serving.openai.tools import choice_of, tools_of
from bessemer.serving.retrieval.annotations import ServedHit
from bessemer.serving.retrieval.stores import VectorStores, sources_for
from bessemer.serving.runtime.bodies import ApiError, Body, Name, read_body
from bessemer.serving.runtime.clients import Caller, caller_of
from bessemer.serving.runtime.served import Chat, Served
from bessemer.serving.runtime.streams import respond
from bessemer.tokenization.prompts import infill_prompt


class EmbeddingsRequest(Body):
    """The body of `/v1/embeddings`. dimensions: that of the model, where it is said."""

    model: Name
    input: Annotated[list[str] | list[list[int]], BeforeValidator(prompts_of)] = Field(max_length=EMBEDDED.most)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)


def embeddings_reply(body: EmbeddingsRequest, vectors_ND: Tensor, prompts: Sequence[Sequence[int]]) -> Response:
    """The response. vectors_ND: one row for each text. prompts: tokens of each text. Raises ApiError where the requested
    dimension is not the model's."""
    width = vectors_ND.shape[1]
    if body.dimensions not in (None, width):
        raise ApiError(
            f"'dimensions' must be {width}, the width of this model, got {body.dimensions}",
            parameter="dimensions",
            code="invalid_value",
        )
    tokens = sum(map(len, prompts))
    # one vector at a time: a single `json.dumps` of millions of numbers would hold the interpreter's lock
    data = ",".join(
        json.dumps({"object": "embedding", "index": index, "embedding": _encoded(vector_D, body.encoding_format)})
        for index, vector_D in enumerate(vectors_ND)
    )
    rest = json.dumps({"model": body.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return Response(f'{{"object": "list", "data": [{data}], {rest[1:]}', media_type="application/json")


def _encoded(vector_D: Tensor, encoding: str) -> list[float] | str:
    """Numbers, or the bytes of little-endian float32 in base64, the default of OpenAI's clients."""
    if encoding == "float":
        numbers: list[float] = vector_D.tolist()
        return numbers
    return base64.b64encode(vector_D.numpy().astype("<f4").tobytes()).decode()


#: The `permission` of a model in OpenAI's older lists, which vLLM still sends: sampling is allowed, fine-tuning is not.
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
class _Completions:
    """Engine requests, one for each prompt, which have not begun. params: of the first; others differ in `max_tokens`."""

    served: Served
    caller: Caller
    requests: Sequence[EngineRequest]
    params: SamplingParams
    reply: CompletionReply

    async def finish(self) -> list[Completion]:
        return await self.served.worker.complete(self.requests, self.params, self.caller)

    def stream(self) -> AsyncGenerator[list[ChoiceChunk], None]:
        return self.served.worker.chunks(self.requests, self.caller)


@dataclass
class OpenAIApi:
    """The routes below `/v1`. stores: what answers may be drawn from. entails: judges whether their sentences are."""

    served: Served
    stores: VectorStores
    entails: Entails | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1")
        router.add_api_route("/models", self.models, methods=["GET"])
        router.add_api_route("/models/{name:path}", self.model, methods=["GET"])
        for path, endpoint in (
            ("/chat/completions", self.chat),
            ("/completions", self.complete),
            ("/embeddings", self.embed),
        ):
            router.add_api_route(path, endpoint, methods=["POST"], response_model=None)
        return router

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self.model(name) for name in self.served.all_names]}

    async def model(self, name: str) -> dict[str, Any]:
        served = self.served
        served.check_model(name)
        if is_additional := served.is_additional(name):
            engine = next((model.engine for model in served.open_additional if model.name == name), None)
        else:
            engine = served.engine
        is_adapter = not is_additional and served.adapter(name) is not None
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "bessemer",
            # an adapter's base model, by name: a path of this machine is not for clients
            "root": name if is_additional else served.model_name,
            "parent": served.model_name if is_adapter else None,
            # vLLM's name of the context length; unknown while an additional model is not loaded
            "max_model_len": None if engine is None else engine.context_length,
            # OpenRouter's name of what a model reads, and the size beyond which a picture has no use
            "input_modalities": None if engine is None else ["text"] if engine.pictures is None else ["text", "image"],
            "image_size": None if engine is None or engine.pictures is None else engine.pictures.preprocessor.useful_size,
            "permission": [{**_PERMISSION, "id": f"modelperm-{name}", "created": self.started}],
        }

    async def chat(self, request: Request) -> Response:
        body = await read_body(ChatRequest, request)
        caller = caller_of(request)
        served = await self.served.model_for(body.model, caller)
        with ExitStack() as admission:
            # 503 before any work
            admission.enter_context(await served.worker.place(body.n, caller))
            sources = None
            if (retrieval := body.retrieval) is not None:
                asked = ("messages", body.last_question) if retrieval.query is None else ("retrieval.query", retrieval.query)
                parameter, question = asked
                sources = await sources_for(question, retrieval.wanted(), self.stores, caller.client, parameter)
            turns = await served.start(lambda: _chat(body, caller, sources))
            reply = ChatReply(body, served.engine.tokenizer, turns, self.entails)
            return await respond(request, turns, reply, admission, caller.headers, is_streamed=body.stream)

    async def complete(self, request: Request) -> Response:
        body = await read_body(CompletionRequest, request)
        caller = caller_of(request)
        self.served.check_unguarded()
        served = await self.served.model_for(body.model, caller)
        with ExitStack() as admission:
            admission.enter_context(await served.worker.place(len(body.prompt) * body.answers, caller))
            work = await asyncio.to_thread(_prepare, served, body, caller)
            return await respond(request, work, work.reply, admission, caller.headers, is_streamed=body.stream)

    async def embed(self, request: Request) -> Response:
        body = await read_body(EmbeddingsRequest, request)
        caller = caller_of(request)
        served = await self.served.model_for(body.model, caller)
        # no more of the texts are computed at once
        with await served.worker.place(min(len(body.input), served.engine.max_num_seqs), caller):
            return await asyncio.to_thread(_embeddings, served, body, caller)


def _chat(body: ChatRequest, caller: Caller, sources: Sequence[ServedHit] | None) -> Chat:
    return Chat(
        caller,
        body.model,
        [message.as_template_input() for message in body.messages],
        body.sampling,
        body.parameter_in,
        token_limit=body.token_limit,
        tools=[] if body.tool_choice == "none" else tools_of(body.tools),
        choice=choice_of(body.tool_choice, body.parallel_tool_calls),
        thinking_budget=body.budget,
        answers=body.n,
        cache_salt=body.cache_salt,
        priority=caller.client.priority(body.priority),
        sources=sources,
        takes_server_tools=body.tool_choice != "none",
        continues=body.continue_final_message is not False,
    )


def _embeddings(served: Served, body: EmbeddingsRequest, caller: Caller) -> Response:
    prompts = {name: _tokens(served, name, given, None) for name, given in _named("input", body.input)}
    for name, tokens in prompts.items():
        served.check_length(name, len(tokens), 0)
    texts = list(prompts.values())
    caller.spend(prompt=sum(map(len, texts)))
    # in batches, between which other requests get their turn
    size, adapter = served.engine.max_num_seqs, served.adapter(body.model)
    batches = [served.engine.embed(texts[start : start + size], adapter=adapter) for start in range(0, len(texts), size)]
    return embeddings_reply(body, torch.cat(batches), texts)


def _named(parameter: str, given: Sequence[str | list[int]]) -> list[tuple[str, str | list[int]]]:
    """Each text or list of token ids with the name that errors call it by."""
    names = [parameter] if len(given) == 1 else [f"{parameter}[{index}]" for index in range(len(given))]
    return list(zip(names, given, strict=True))


def _prepare(served: Served, body: CompletionRequest, caller: Caller) -> _Completions:
    """Encode the prompts and check them, off the event loop."""
    tokenizer = served.engine.tokenizer
    prompts = {name: _tokens(served, name, given, body.suffix) for name, given in _named("prompt", body.prompt)}
    echoes = [
        Echo(given if isinstance(given, str) else tokenizer.decode(tokens), tokens) if body.echo else None
        for given, tokens in zip(body.prompt, prompts.values(), strict=True)
    ]
    assert body.token_limit is not None
    limits = [served.most_tokens(name, len(tokens), body.token_limit, caller) for name, tokens in prompts.items()]
    params = [body.sampling(limit) for limit in limits]
    adapter, salt = served.adapter(body.model), caller.salt(body.cache_salt)
    priority = caller.client.priority(body.priority)
    with _refusals(body):
        requests = [
            served.engine.prepare(list(tokens), its_params, priority=priority, adapter=adapter, cache_salt=salt)
            for tokens, its_params in zip(prompts.values(), params, strict=True)
        ]
    return _Completions(
        served, caller, requests, params[0], CompletionReply(body, tokenizer, list(prompts.values()), echoes, requests)
    )


def _tokens(served: Served, name: str, given: str | list[int], suffix: str | None) -> list[int]:
    """Token ids of a prompt. name: the parameter that gives it; suffix: of a prompt to fill in the middle."""
    tokenizer = served.engine.tokenizer
    if suffix is not None:
        assert isinstance(given, str), "the request's validator refuses token ids with a suffix"
        served.check_text(name, given + suffix)
        try:
            return infill_prompt(tokenizer, given, suffix)
        except ConfigError as error:
            raise ApiError(f"suffix: {error}", parameter="suffix", code="unsupported_parameter") from None
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


@contextmanager
def _refusals(body: GenerationRequest) -> Iterator[None]:
    """Turn the engine's errors into the API's, with the parameter that they name."""
    try:
        yield
    except RequestError as error:
        raise ApiError(str(error), parameter=body.parameter_in(str(error)), code="invalid_value") from None
