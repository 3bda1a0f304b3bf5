"""Ollama's API below `/api`: chats, completions, embeddings, and what is served. Streams are lines of JSON."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from fastapi import APIRouter, Request, Response

from bessemer.assistant.messages import BadCall, Called, EndReason, RolledBack, TextDelta, ThinkingDelta, TurnEnd
from bessemer.core.errors import ConfigError, RequestError
from bessemer.inference.async_generation import ChoiceChunk
from bessemer.inference.engine import Engine
from bessemer.inference.request import Completion
from bessemer.inference.request import Request as EngineRequest
from bessemer.inference.sampling.params import SamplingParams
from bessemer.model.families import family_of
from bessemer.serving.ollama.protocol import ChatBody, EmbedBody, GenerateBody, GenerationBody, ShowBody
from bessemer.serving.openai.replies import chat_log_probs
from bessemer.serving.openai.tools import tools_of
from bessemer.serving.runtime.bodies import ApiError, read_body, withdrawn
from bessemer.serving.runtime.clients import Caller, caller_of
from bessemer.serving.runtime.served import Chat, Served
from bessemer.serving.runtime.streams import Reply, respond
from bessemer.serving.runtime.worker import ChoiceEvents, Turns
from bessemer.tokenization.prompts import fim_tokens, infill_prompt

#: The path below which errors have Ollama's form.
PREFIX = "/api"
#: Ollama's `done_reason` of a turn.
_DONE: dict[EndReason, str] = {"answer": "stop", "length": "length", "tool_calls": "stop", "rounds": "stop", "refused": "stop"}
#: Far in the future: the served model stays.
_NEVER = "9999-12-31T23:59:59Z"


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in Ollama's form."""
    return {"error": str(error)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass
class _Clock:
    """Durations in nanoseconds. The prompt is read until the first token comes."""

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
    """A response as lines of JSON, each with a part of the answer; whole, it is one with all of it."""

    media_type = "application/x-ndjson"

    def __init__(self, body: GenerationBody) -> None:
        self._name = body.model
        self._clock = _Clock()
        # a part with nothing in it, which every client adds to what it has
        self.ping = self._line(self._part(""), done=False)

    def failed(self, error: ApiError) -> str:
        return _json_line(error_body(error))

    def _line(self, part: dict[str, Any], **rest: Any) -> str:
        return _json_line(self._object(part, **rest))

    def _object(self, part: dict[str, Any], **rest: Any) -> dict[str, Any]:
        return {"model": self._name, "created_at": _now(), **part, **rest}

    def _part(self, text: str, thinking: str = "", calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        raise NotImplementedError


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
        """What each entry of a step adds. Raises ApiError where a hook withdraws what was sent."""
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
    """A completion of a text, without the chat template."""

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


@dataclass(frozen=True)
class _TextWork:
    """A prompt that is gone on with."""

    served: Served
    caller: Caller
    request: EngineRequest
    params: SamplingParams

    async def finish(self) -> list[Completion]:
        return await self.served.worker.complete([self.request], self.params, self.caller)

    def stream(self) -> AsyncGenerator[list[ChoiceChunk], None]:
        return self.served.worker.chunks([self.request], self.caller)


@dataclass
class OllamaApi:
    """The routes below `/api`. Models come by the server's settings: none is pulled, copied or deleted."""

    served: Served
    started: str = field(default_factory=_now)

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
            return {"model": body.model, "created_at": _now(), "message": {"role": "assistant", "content": ""}, **_LOADED}
        return await self._turn(request, served, body, caller, is_chat=True)

    async def generate(self, request: Request) -> Response | dict[str, Any]:
        body = await read_body(GenerateBody, request)
        caller = caller_of(request)
        served = await self.served.model_for(body.model, caller)
        if not body.prompt:
            return {"model": body.model, "created_at": _now(), "response": "", **_LOADED}
        if not (body.raw or body.suffix):
            return await self._turn(request, served, body, caller, is_chat=False)
        self.served.check_unguarded()
        with ExitStack() as admission:
            admission.enter_context(served.worker.admit(1))
            work = await asyncio.to_thread(_text_work, served, body, caller)
            reply = TextReply(body, served.engine, work.request)
            return await respond(request, work, reply, admission, caller.headers, is_streamed=body.stream)

    async def embed(self, request: Request) -> dict[str, Any]:
        body = await read_body(EmbedBody, request)
        clock = _Clock()
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
            admission.enter_context(served.worker.admit(1))
            turns = await asyncio.to_thread(lambda: served.begin(chat))
            reply = TurnReply(body, served.engine, turns, is_chat)
            return await respond(request, turns, reply, admission, caller.headers, is_streamed=body.stream)

    async def _vectors(self, request: Request, body: EmbedBody, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """A vector of each text, of length 1, and the number of tokens."""
        caller = caller_of(request)
        served = await self.served.model_for(body.model, caller)
        engine = served.engine
        if not texts:
            return [], 0
        with served.worker.admit(min(len(texts), engine.max_num_seqs)):
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


def _json_line(value: dict[str, Any]) -> str:
    # JSON escapes what is not ASCII, so that no character is taken for the end of the line
    return json.dumps(value) + "\n"


def _embed_durations(clock: _Clock, tokens: int) -> dict[str, int]:
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
    """What the model can be asked, by its chat template and its control tokens."""
    template = engine.tokenizer.chat_template or ""
    capabilities = ["completion", "embedding"]
    capabilities += ["tools"] if "tools" in template else []
    capabilities += ["thinking"] if "<think>" in template else []
    try:
        fim_tokens(engine.tokenizer)
    except ConfigError:
        return capabilities
    return [*capabilities, "insert"]


def _text_work(served: Served, body: GenerateBody, caller: Caller) -> _TextWork:
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
    return _TextWork(served, caller, request, params)


def _embedded(served: Served, body: EmbedBody, texts: Sequence[str], caller: Caller) -> tuple[list[list[float]], int]:
    engine, tokenizer = served.engine, served.engine.tokenizer
    encoded = []
    for text in texts:
        if not body.truncate:
            served.check_text("input", text)
        tokens = tokenizer.encode(text)[: engine.context_length] if body.truncate else tokenizer.encode(text)
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
