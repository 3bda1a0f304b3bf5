"""Ollama's API below `/api`: chats, completions, embeddings, and what is served. Streams are lines of JSON."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from fastapi import APIRouter, Request, Response

from bessemer.core.errors import ConfigError, RequestError
from bessemer.inference.engine import Engine
from bessemer.model.families import family_of
from bessemer.serving.ollama.protocol import ChatBody, EmbedBody, GenerateBody, ShowBody
from bessemer.serving.ollama.replies import Clock, TextReply, TurnReply, now
from bessemer.serving.openai.tools import tools_of
from bessemer.serving.runtime.bodies import ApiError, read_body
from bessemer.serving.runtime.clients import Caller, caller_of
from bessemer.serving.runtime.served import Chat, Served, TextWork
from bessemer.serving.runtime.streams import respond
from bessemer.tokenization.prompts import fim_tokens, infill_prompt

#: The path below which errors have Ollama's form.
PREFIX = "/api"
#: More characters than any token has: a text is cut to the context's tokens times this before it is encoded.
_CHARACTERS_OF_A_TOKEN = 128
#: Far in the future: the served model stays.
_NEVER = "9999-12-31T23:59:59Z"


@dataclass
class OllamaApi:
    """The routes below `/api`. The server's settings name its models; clients cannot pull, copy or delete any."""

    served: Served
    started: str = field(default_factory=now)

    def router(self) -> APIRouter:
        router = APIRouter(prefix=PREFIX)
        for path, read in (("/tags", self.tags), ("/ps", self.loaded), ("/version", self.version)):
            router.add_api_route(path, read, methods=["GET"])
        for path, endpoint in (
            ("/chat", self.chat),
            ("/generate", self.generate),
            ("/embed", self.embed),
            ("/embeddings", self.embed_one),
            ("/show", self.show),
        ):
            router.add_api_route(path, endpoint, methods=["POST"], response_model=None)
        return router

    async def version(self) -> dict[str, str]:
        return {"version": version("bessemer")}

    async def tags(self) -> dict[str, Any]:
        return {"models": [self._listed(name) | {"modified_at": self.started} for name in self.served.all_names]}

    async def loaded(self) -> dict[str, Any]:
        names = [*self.served.names, *(model.name for model in self.served.open_additional)]
        return {
            "models": [
                self._listed(name) | {"expires_at": _NEVER, "size_vram": 0, "context_length": engine.context_length}
                for name in names
                if (engine := self._engine(name)) is not None
            ]
        }

    async def show(self, request: Request) -> dict[str, Any]:
        body = await read_body(ShowBody, request)
        name = body.model or body.name
        if not name:
            raise ApiError("missing required parameter: 'model'", parameter="model", code="missing_required_parameter")
        served = await self.served.model_for(name, caller_of(request))
        engine = served.engine
        config = engine.model.config
        family = _family(engine)
        settings = "\n".join(f"{key} {value}" for key, value in engine.sampling_settings.items())
        template = engine.tokenizer.chat_template or ""
        return {
            "modelfile": f"FROM {name}\n",
            "parameters": settings,
            "template": template,
            "license": "",
            "modified_at": self.started,
            "details": self._details(engine),
            "model_info": {
                "general.architecture": family,
                "general.parameter_count": config.parameters(),
                f"{family}.context_length": engine.context_length,
                f"{family}.embedding_length": config.hidden_size,
                f"{family}.block_count": config.num_hidden_layers,
                f"{family}.vocab_size": config.vocab_size,
            },
            "capabilities": _capabilities(engine),
        }

    async def chat(self, request: Request) -> Response | dict[str, Any]:
        body = await read_body(ChatBody, request)
        caller = caller_of(request)
        served = await self.served.model_for(body.model, caller)
        if not body.messages:
            return {"model": body.model, "created_at": now(), "message": {"role": "assistant", "content": ""}, **_LOADED}
        return await self._turn(request, served, body, caller, is_chat=True)

    async def generate(self, request: Request) -> Response | dict[str, Any]:
        body = await read_body(GenerateBody, request)
        caller = caller_of(request)
        served = await self.served.model_for(body.model, caller)
        if not body.prompt:
            return {"model": body.model, "created_at": now(), "response": "", **_LOADED}
        if not (body.raw or body.suffix):
            return await self._turn(request, served, body, caller, is_chat=False)
        self.served.check_unguarded()
        with ExitStack() as admission:
            admission.enter_context(await served.worker.place(1, caller))
            work = await asyncio.to_thread(_text_work, served, body, caller)
            reply = TextReply(body, served.engine, work.request)
            return await respond(request, work, reply, admission, caller.headers, is_streamed=body.stream)

    async def embed(self, request: Request) -> dict[str, Any]:
        body = await read_body(EmbedBody, request)
        clock = Clock()
        vectors, tokens = await self._vectors(request, body, body.input)
        return {"model": body.model, "embeddings": vectors, **_embed_durations(clock, tokens)}

    async def embed_one(self, request: Request) -> dict[str, Any]:
        body = await read_body(EmbedBody, request)
        vectors, _ = await self._vectors(request, body, [body.prompt])
        return {"embedding": vectors[0]}

    async def _turn(
        self, request: Request, served: Served, body: ChatBody | GenerateBody, caller: Caller, *, is_chat: bool
    ) -> Response:
        own = served.engine.sampling_settings
        chat = Chat(
            caller,
            body.model,
            body.in_chat(),
            lambda most: body.sampling(own, most),
            body.parameter_in,
            token_limit=body.options.token_limit,
            tools=tools_of(body.tools) if isinstance(body, ChatBody) else (),
            thinking_budget=body.thinking_budget,
        )
        with ExitStack() as admission:
            admission.enter_context(await served.worker.place(1, caller))
            turns = await served.start(lambda: chat)
            reply = TurnReply(body, served.engine, turns, is_chat)
            return await respond(request, turns, reply, admission, caller.headers, is_streamed=body.stream)

    async def _vectors(self, request: Request, body: EmbedBody, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """A vector of each text, of length 1, and the number of tokens."""
        caller = caller_of(request)
        served = await self.served.model_for(body.model, caller)
        engine = served.engine
        if not texts:
            return [], 0
        with await served.worker.place(min(len(texts), engine.max_num_seqs), caller):
            return await asyncio.to_thread(_embedded, served, body, texts, caller)

    def _engine(self, name: str) -> Engine | None:
        """The engine of a name; None for an additional model that is not loaded."""
        if not self.served.is_additional(name):
            return self.served.engine
        return next((model.engine for model in self.served.open_additional if model.name == name), None)

    def _listed(self, name: str) -> dict[str, Any]:
        engine = self._engine(name)
        return {
            "name": name,
            "model": name,
            # bytes of the weights as they are held; unknown while the model is not loaded
            "size": 0 if engine is None else _bytes_of(engine),
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": self._details(engine),
        }

    def _details(self, engine: Engine | None) -> dict[str, Any]:
        parameters = "" if engine is None else _short(engine.model.config.parameters())
        family = "" if engine is None else _family(engine)
        return {
            "parent_model": "",
            "format": "bessemer",
            "family": family,
            "families": [family] if family else [],
            "parameter_size": parameters,
            "quantization_level": "",
        }


#: The end of a response to a request that only loads the model.
_LOADED = {"done": True, "done_reason": "load"}


def _embed_durations(clock: Clock, tokens: int) -> dict[str, int]:
    durations = clock.durations(tokens, 0)
    return {name: durations[name] for name in ("total_duration", "load_duration", "prompt_eval_count")}


def _bytes_of(engine: Engine) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in engine.model.state_dict().values())


def _family(engine: Engine) -> str:
    """The model's architecture, by its Hugging Face name."""
    config = engine.model.config
    return config.model_type or family_of(config).model_type


def _short(count: int) -> str:
    """A number of parameters as Ollama writes it."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)


def _capabilities(engine: Engine) -> list[str]:
    """The capabilities of the model, by its chat template and its control tokens."""
    template = engine.tokenizer.chat_template or ""
    capabilities = ["completion", "embedding"]
    capabilities += ["tools"] if "tools" in template else []
    capabilities += ["thinking"] if "<think>" in template else []
    try:
        fim_tokens(engine.tokenizer)
    except ConfigError:
        return capabilities
    return [*capabilities, "insert"]


def _text_work(served: Served, body: GenerateBody, caller: Caller) -> TextWork:
    """Encode the prompt and check it, off the event loop."""
    tokenizer = served.engine.tokenizer
    served.check_text("prompt", body.prompt + body.suffix)
    if body.suffix:
        try:
            tokens = infill_prompt(tokenizer, body.prompt, body.suffix)
        except ConfigError as error:
            raise ApiError(f"suffix: {error}", parameter="suffix", code="unsupported_parameter") from None
    else:
        tokens = tokenizer.encode(body.system + body.prompt)
    most = served.most_tokens("prompt", len(tokens), body.options.token_limit, caller)
    params = body.sampling(served.engine.sampling_settings, most)
    try:
        request = served.engine.prepare(tokens, params, adapter=served.adapter(body.model), cache_salt=caller.salt(None))
    except RequestError as error:
        raise ApiError(str(error), parameter=body.parameter_in(str(error)), code="invalid_value") from None
    return TextWork(served, caller, request, params)


def _embedded(served: Served, body: EmbedBody, texts: Sequence[str], caller: Caller) -> tuple[list[list[float]], int]:
    engine, tokenizer = served.engine, served.engine.tokenizer
    encoded = []
    for text in texts:
        if not body.truncate:
            served.check_text("input", text)
        if body.truncate:
            # do not encode text far beyond the context
            text = text[: engine.context_length * _CHARACTERS_OF_A_TOKEN]
        tokens = tokenizer.encode(text)
        tokens = tokens[: engine.context_length] if body.truncate else tokens
        if not tokens:
            raise ApiError("input: a text is empty; leave it out", parameter="input", code="invalid_value")
        served.check_length("input", len(tokens), 0)
        encoded.append(tokens)
    count = sum(map(len, encoded))
    caller.spend(prompt=count)
    # in batches, between which other requests get their turn
    size, adapter = engine.max_num_seqs, served.adapter(body.model)
    vectors_ND = torch.cat(
        [engine.embed(encoded[start : start + size], adapter=adapter) for start in range(0, len(encoded), size)]
    )
    if body.dimensions is not None and body.dimensions < vectors_ND.shape[1]:
        vectors_ND = torch.nn.functional.normalize(vectors_ND[:, : body.dimensions], dim=-1)
    return vectors_ND.tolist(), count
