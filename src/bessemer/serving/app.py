"""The HTTP application: OpenAI's and Anthropic's API, tokens, metrics, health, and the pages of another package."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as package_version
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from bessemer.assistant.hooks import Hook
from bessemer.core.errors import BessemerError
from bessemer.serving.anthropic.api import PREFIX, AnthropicApi, error_body
from bessemer.serving.config import ServingConfig
from bessemer.serving.openai.api import OpenAIApi
from bessemer.serving.openai.vllm_routes import AdaptersApi, DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from bessemer.serving.responses.api import ResponsesApi
from bessemer.serving.responses.protocol import MemoryStore, ResponseStore
from bessemer.serving.runtime.bodies import ApiError, read_body
from bessemer.serving.runtime.clients import Keys, caller_of
from bessemer.serving.runtime.gate import PUBLIC, Gate
from bessemer.serving.runtime.metrics import CONTENT_TYPE, MeasuredEngine, Metrics
from bessemer.serving.runtime.models import LOOK_SECONDS, Shelf
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.streams import as_api_error
from bessemer.serving.runtime.worker import TextEngine, Worker

#: Seconds between two looks at the file of keys.
_REFRESH_SECONDS = 1.0


@dataclass(frozen=True)
class Pages:
    """Routes of another package beside the API. public: their paths that need no key."""

    routers: Sequence[APIRouter] = ()
    public: Collection[str] = ()


def no_pages(served: Served) -> Pages:
    """The API alone."""
    return Pages()


def create_app(
    engine: TextEngine,
    model_name: str,
    config: ServingConfig | None = None,
    pages: Callable[[Served], Pages] = no_pages,
    shelf: Shelf | None = None,
    hooks: Sequence[Hook] = (),
    store: ResponseStore | None = None,
    is_behind_gate: bool = False,
) -> FastAPI:
    """An application that serves a model under `model_name`, and its adapters each under its own name.

    pages: makes what is shown beside the API, of what is served; a page at `/` takes the place of the API's line there. shelf:
    the models beside it. hooks: look at every turn of every dialect, and may hold back its text, take it back, or refuse; texts
    that are no conversation are then not answered. store: where responses are kept; None: in memory. is_behind_gate: requests
    have passed a gate elsewhere, which has left their callers in the scope.

    Every error is answered in the form of the API that was asked. `config.host` and `config.port` are for the server that runs
    the application. Its `state` has what is `served`. Raises ArtefactError and ConfigError for a file of keys that cannot be
    read.
    """
    config = config or ServingConfig()
    asks_for_keys = not is_behind_gate and (config.keys is not None or config.api_key is not None)
    keys = Keys(config.keys, config.api_key) if asks_for_keys else None
    worker = Worker(engine, config.max_waiting)
    served = Served(engine, model_name, worker, config.aliases, shelf, hooks)
    apis = (
        OpenAIApi(served),
        ResponsesApi(served, store or MemoryStore()),
        AnthropicApi(served),
        AdaptersApi(served, config.adapter_root),
    )

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        watching = [asyncio.create_task(watch(keys)), asyncio.create_task(_look_after(served.shelf))]
        try:
            yield
        finally:
            for one in watching:
                one.cancel()
            if served.shelf is not None:
                await served.shelf.close()
            # at its end the engine's thread ends
            worker.close()

    app = FastAPI(title="Bessemer", docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    app.state.served = served
    beside = pages(served)
    if not is_behind_gate:
        app.add_middleware(Gate, config=config, keys=keys, error_body=error_body_of, public=PUBLIC.union(beside.public))
    for router in (*beside.routers, *(api.router() for api in apis)):
        app.include_router(router)
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(BessemerError, _answer_bessemer_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_parameter_error)
    app.add_exception_handler(Exception, answer_failure)

    # Anthropic's clients look whether a server is there
    @app.head("/")
    @app.get("/")
    async def about() -> dict[str, str]:
        return {"name": "bessemer", "version": package_version("bessemer"), "model": model_name}

    @app.get("/health")
    async def health() -> JSONResponse:
        state = {"model": model_name, "requests": served.requests}
        if (failure := worker.failure) is not None:
            return JSONResponse({"status": "failed", "reason": str(failure), **state}, status_code=503)
        return JSONResponse({"status": "ok", **state})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        if worker.is_draining:
            return JSONResponse({"status": "stopping", "model": model_name, "requests": served.requests}, status_code=503)
        return await health()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": package_version("bessemer")}

    @app.get("/openapi.json")
    async def describe() -> dict[str, Any]:
        return described()

    def engines() -> list[tuple[str, str, MeasuredEngine]]:
        beside = [] if served.shelf is None else served.shelf.open_models
        return [(model_name, "0", engine), *((one.name, "0", one.engine) for one in beside)]

    metrics = Metrics(engines)

    @app.get("/metrics")
    async def tell_metrics() -> Response:
        # it waits for the step under way
        return Response(await asyncio.to_thread(metrics.render), media_type=CONTENT_TYPE)

    @app.post("/tokenize")
    async def tell_tokens(request: Request) -> dict[str, Any]:
        asked = await read_body(TokenizeRequest, request)
        chosen = await served.of(asked.model or model_name, caller_of(request))
        return await served.aside(lambda: tokenize(chosen.engine, asked))

    @app.post("/detokenize")
    async def tell_text(request: Request) -> dict[str, Any]:
        asked = await read_body(DetokenizeRequest, request)
        chosen = await served.of(asked.model or model_name, caller_of(request))
        return await served.aside(lambda: detokenize(chosen.engine, asked))

    return app


@cache
def described() -> dict[str, Any]:
    """The description of the API, made when it is first asked for."""
    from bessemer.serving.openapi import description

    return description()


async def _look_after(shelf: Shelf | None) -> None:
    """Close models that nobody asks for, until cancelled."""
    while shelf is not None:
        await asyncio.sleep(LOOK_SECONDS)
        await shelf.close_idle()


async def watch(keys: Keys | None) -> None:
    """Look for changes of the keys until cancelled."""
    while keys is not None:
        await asyncio.sleep(_REFRESH_SECONDS)
        keys.refresh()


async def answer_api_error(request: Request, error: Exception) -> Response:
    """An ApiError, in the form of the API that was asked."""
    assert isinstance(error, ApiError)
    return JSONResponse(error_body_of(request.scope["path"], error), status_code=error.status, headers=error.headers)


def error_body_of(path: str, error: ApiError) -> dict[str, Any]:
    """An error in the form of the API that a path belongs to."""
    return error_body(error) if path.startswith(PREFIX) else error.body()


async def answer_http_error(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    told = ApiError(f"{request.method} {path}: {error.detail}", status=error.status_code)
    return JSONResponse(error_body_of(path, told), status_code=error.status_code, headers=error.headers)


async def _answer_parameter_error(request: Request, error: Exception) -> Response:
    """A parameter in the address that is none of its type."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await answer_api_error(request, ApiError(f"{name}: {first['msg']}", parameter=name, code="invalid_value"))


async def _answer_bessemer_error(request: Request, error: Exception) -> Response:
    """Something that the tokenizer or the engine finds wrong in the request, or that ended the engine."""
    return await answer_api_error(request, as_api_error(error))


async def answer_failure(request: Request, error: Exception) -> Response:
    """A fault of ours, which the server's log shows in full."""
    told = ApiError("the server failed; its log says why", status=500, kind="server_error")
    return JSONResponse(error_body_of(request.scope["path"], told), status_code=500)
