"""The HTTP application: OpenAI's chat and plain completions, the list of models, health, and the chat page."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from bessemer.core.errors import BessemerError
from bessemer.inference.engine import Chunk
from bessemer.serving.config import ServingConfig
from bessemer.serving.protocol import ApiError, ChatRequest, CompletionRequest, GenerationRequest, read_request
from bessemer.serving.turns import TextEngine, Turns

#: The chat page runs its own script and speaks to this server, nothing else.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
#: nginx's number for a client that left before its answer; nobody receives it.
_CLIENT_LEFT = 499


def create_app(engine: TextEngine, model_name: str, config: ServingConfig | None = None) -> FastAPI:
    """An application that serves one model under `model_name`.

    Every error is answered in OpenAI's form. `config.host` and `config.port` are for whoever runs the application.
    """
    config = config or ServingConfig()
    service = _Service(engine, model_name, Turns(engine, config.max_active, config.max_waiting))
    app = FastAPI(title="Bessemer", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(service.router(), dependencies=[Depends(_require_key(config.api_key))])
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(BessemerError, _answer_bessemer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_failure)
    page = _chat_page(config.suggestions)

    @app.get("/")
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY, "Referrer-Policy": "no-referrer"})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": model_name, "requests": service.turns.admitted}

    return app


@dataclass
class _Answer:
    """One answer as it grows: its text, its counts, and how it takes OpenAI's shapes."""

    model: str
    is_chat: bool
    prompt_tokens: int
    text: str = ""
    completion_tokens: int = 0
    finish_reason: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)

    def take(self, chunks: list[Chunk]) -> str:
        """Add a turn's chunks; returns their text."""
        text = "".join(chunk.text for chunk in chunks)
        self.text += text
        for chunk in chunks:
            self.completion_tokens += len(chunk.token_ids)
            self.finish_reason = chunk.finish_reason or self.finish_reason
        return text

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def head(self, streamed: bool) -> dict[str, Any]:
        name = ("chat.completion" + (".chunk" if streamed else "")) if self.is_chat else "text_completion"
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.identity}", "object": name, "created": self.created, "model": self.model}

    def whole(self) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        content = {"message": {"role": "assistant", "content": self.text}} if self.is_chat else {"text": self.text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": self.finish_reason}
        return {**self.head(streamed=False), "choices": [choice], "usage": self.usage}

    def piece(self, text: str, *, role: bool = False, finish_reason: str | None = None) -> dict[str, Any]:
        """One event of a stream: a role, some text, or the reason it ended."""
        delta = ({"role": "assistant"} if role else {}) | ({"content": text} if text or role else {})
        content = {"delta": delta} if self.is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return {**self.head(streamed=True), "choices": [choice]}


@dataclass
class _Service:
    """The routes below `/v1` and what they share."""

    engine: TextEngine
    model_name: str
    turns: Turns
    started: int = field(default_factory=lambda: int(time.time()))

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1")
        router.add_api_route("/models", self.models, methods=["GET"])
        router.add_api_route("/models/{name:path}", self.model, methods=["GET"])
        router.add_api_route("/chat/completions", self.chat, methods=["POST"], response_model=None)
        router.add_api_route("/completions", self.complete, methods=["POST"], response_model=None)
        return router

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self.model(self.model_name)]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "bessemer",
            "max_model_len": self.engine.context_length,  # vLLM's name for the context
        }

    async def chat(self, request: Request) -> Response:
        asked = read_request(ChatRequest, await request.body())
        self._check_model(asked.model)
        messages = [message.as_template_input() for message in asked.messages]
        template = self.engine.tokenizer.apply_chat_template
        prompt = await asyncio.to_thread(template, messages, add_generation_prompt=True)
        return await self._answer(request, asked, prompt, "messages")

    async def complete(self, request: Request) -> Response:
        asked = read_request(CompletionRequest, await request.body())
        self._check_model(asked.model)
        tokenizer, given = self.engine.tokenizer, asked.prompt
        if isinstance(given, str):
            prompt = await asyncio.to_thread(tokenizer.encode, given)
        elif given and all(0 <= token < tokenizer.vocab_size for token in given):
            prompt = given
        else:
            raise ApiError(
                f"invalid 'prompt': token ids must lie in 0 … {tokenizer.vocab_size - 1}, and be at least one",
                parameter="prompt",
                code="invalid_value",
            )
        return await self._answer(request, asked, prompt, "prompt")

    def _check_model(self, name: str) -> None:
        if name != self.model_name:
            raise ApiError(
                f"the model '{name}' does not exist; this server has '{self.model_name}'",
                status=404,
                parameter="model",
                code="model_not_found",
            )

    async def _answer(self, request: Request, asked: GenerationRequest, prompt: list[int], parameter: str) -> Response:
        left = self.engine.context_length - len(prompt)
        wanted = asked.token_limit
        if left < (wanted or 1):
            raise ApiError(
                f"this model's context is {self.engine.context_length} tokens, and the request has {len(prompt)} in its "
                f"{parameter}" + (f" and asks for {wanted} more" if wanted and left >= 1 else ""),
                parameter=parameter,
                code="context_length_exceeded",
            )
        params = asked.sampling(wanted or left)
        answer = _Answer(self.model_name, isinstance(asked, ChatRequest), len(prompt))
        turns = self.turns.generate(prompt, params)
        await anext(turns)  # admitted, or 503 while there is still a status to set
        if asked.stream:
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_events(answer, turns, with_usage), media_type="text/event-stream")
        return await _until_client_leaves(request, _whole_answer(answer, turns))


async def _whole_answer(answer: _Answer, turns: AsyncGenerator[list[Chunk], None]) -> Response:
    async with aclosing(turns):
        async for chunks in turns:
            answer.take(chunks)
    return JSONResponse(answer.whole())


async def _events(answer: _Answer, turns: AsyncGenerator[list[Chunk], None], with_usage: bool) -> AsyncIterator[str]:
    """The server-sent events of a stream. With usage every event has the key, and one more before the end fills it."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps({'usage': None, **body} if with_usage else body, ensure_ascii=False)}\n\n"

    async with aclosing(turns):
        try:
            if answer.is_chat:
                yield event(answer.piece("", role=True))
            async for chunks in turns:
                if text := answer.take(chunks):
                    yield event(answer.piece(text))
        except BessemerError as error:  # the status is long sent, so the error is an event, as OpenAI's clients expect
            yield event(ApiError(str(error)).body())
            return
        yield event(answer.piece("", finish_reason=answer.finish_reason))
        if with_usage:
            yield event({**answer.head(streamed=True), "choices": [], "usage": answer.usage})
        yield "data: [DONE]\n\n"


async def _until_client_leaves(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response of `work`, which is cancelled when the client disconnects first."""
    answering = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=_CLIENT_LEFT)
    finally:
        answering.cancel()
        leaving.cancel()


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _chat_page(suggestions: list[str]) -> str:
    """The page's HTML with the suggestions as JSON, in which no `<` can end the script element early."""
    page = resources.files("bessemer.serving").joinpath("chat.html").read_text(encoding="utf-8")
    given = json.dumps({"suggestions": suggestions}).replace("<", "\\u003c")
    return page.replace('{"suggestions": []}', given, 1)


def _require_key(api_key: str | None) -> Callable[[Request], Awaitable[None]]:
    """A check that a request carries the key, when there is one."""

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if api_key is not None and not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise ApiError(
                "this server needs an API key: send it as 'Authorization: Bearer KEY'", status=401, code="invalid_api_key"
            )

    return check


def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = ApiError(f"{request.method} {request.url.path}: {error.detail}").body()
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _answer_bessemer_error(_: Request, error: Exception) -> Response:
    """Something that the tokenizer or the engine finds wrong in the request."""
    return JSONResponse(ApiError(str(error)).body(), status_code=400)


def _answer_failure(_: Request, error: Exception) -> Response:
    """A fault of ours, which the server's log shows in full."""
    return JSONResponse(ApiError("the server failed; its log says why", kind="server_error").body(), status_code=500)
