"""The HTTP application: OpenAI's, Anthropic's and Ollama's API, `/infill`, tokens, metrics, health, another package's pages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from bessemer.assistant.hooks import Hook
from bessemer.assistant.tools import Tool
from bessemer.core.errors import BessemerError
from bessemer.inference.engine import Engine
from bessemer.retrieval.citations import Entails
from bessemer.retrieval.expansion import Expander
from bessemer.retrieval.rerank import Reranker
from bessemer.serving.a2a.api import A2AApi
from bessemer.serving.anthropic.api import PREFIX, AnthropicApi, error_body
from bessemer.serving.config import ServingConfig
from bessemer.serving.infill import InfillApi
from bessemer.serving.ollama import api as ollama
from bessemer.serving.ollama.replies import error_body as ollama_error
from bessemer.serving.openai.api import OpenAIApi
from bessemer.serving.openai.vllm_routes import AdaptersApi, DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from bessemer.serving.openai.weight_routes import WeightsApi
from bessemer.serving.responses.api import ResponsesApi
from bessemer.serving.responses.store import MemoryStore, ResponseStore
from bessemer.serving.retrieval.api import FilesApi
from bessemer.serving.retrieval.indexes import SearchModels
from bessemer.serving.retrieval.rerank import RerankApi
from bessemer.serving.retrieval.stores import VectorStores
from bessemer.serving.runtime.admission import QueueLimits
from bessemer.serving.runtime.bodies import ApiError, read_body
from bessemer.serving.runtime.clients import Keys, caller_of
from bessemer.serving.runtime.gate import PUBLIC, Gate
from bessemer.serving.runtime.metrics import CONTENT_TYPE, render_metrics
from bessemer.serving.runtime.models import IDLE_CHECK_SECONDS, ModelPool
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.streams import as_api_error
from bessemer.serving.runtime.worker import Worker

if TYPE_CHECKING:
    from bessemer.serving.openapi import Operation

#: Seconds between two checks of the file of keys.
_REFRESH_SECONDS = 1.0


@dataclass(frozen=True)
class Pages:
    """Routes of another package. public: those of their paths that need no key. operations: gives their descriptions for
    `/openapi.json`, by path and method."""

    routers: Sequence[APIRouter] = ()
    public: Collection[str] = ()
    operations: Callable[[], Mapping[tuple[str, str], Operation]] | None = None


def no_pages(served: Served) -> Pages:
    """The API alone."""
    return Pages()


def create_app(
    engine: Engine,
    model_name: str,
    config: ServingConfig | None = None,
    pages: Callable[[Served], Pages] = no_pages,
    pool: ModelPool | None = None,
    hooks: Sequence[Hook] = (),
    store: ResponseStore | None = None,
    is_behind_gate: bool = False,
    reranker: tuple[str, Reranker] | None = None,
    expander: Expander | None = None,
    entails: Entails | None = None,
    server_tools: Callable[[str], Sequence[Tool]] | None = None,
) -> FastAPI:
    """An application that serves a model under `model_name`, and its adapters each under its own name.

    pages: makes routes beside the API; one at `/` replaces the API's own. pool: additional models. hooks: guardrails of every
    chat; endpoints that bypass them are then closed. store: of responses; None: in memory. is_behind_gate: another process runs
    the gate, and leaves the callers in the scope; clients' files, which would be of one process alone, are not taken then.
    reranker: orders what searches of indexes and stores find; its name is that by which clients ask for it.
    expander: writes headings that these searches look for besides. entails: judges, in several threads, whether sources bear
    out the sentences of a chat's answer (`Entailment.probabilities`); None: by the share of common words. server_tools: as of
    `Served`.

    An error has the form of the API that its path belongs to. `config.host` and `config.port` are not used here. The result's
    `state.served` is a `Served`. Raises ArtefactError and ConfigError for a file of keys or an index that cannot be read.
    """
    config = config or ServingConfig()
    asks_for_keys = not is_behind_gate and (config.keys is not None or config.api_key is not None)
    keys = Keys(config.keys, config.api_key) if asks_for_keys else None
    models = SearchModels(None if reranker is None else reranker[1], expander)
    documents = VectorStores(config.indexes, config.uploads, takes_files=not is_behind_gate, models=models)
    worker = Worker(engine, config.max_waiting, QueueLimits(config.max_queued, config.queue_seconds))
    served = Served(engine, model_name, worker, config.aliases, pool, hooks, server_tools)
    apis = (
        OpenAIApi(served, documents, entails),
        ResponsesApi(served, store or MemoryStore(), documents),
        A2AApi(served, MemoryStore(), needs_key=keys is not None),
        FilesApi(documents),
        RerankApi(served, documents, reranker),
        AnthropicApi(served),
        ollama.OllamaApi(served),
        InfillApi(served),
        AdaptersApi(served, config.adapter_root, other_template=config.other_template),
        WeightsApi(served, config),
    )

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(watch_keys(keys)), asyncio.create_task(_close_idle_models(served.pool))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            if served.pool is not None:
                await served.pool.close()
            worker.close()
            await documents.close()

    app = FastAPI(title="Bessemer", docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    app.state.served = served
    other_pages = pages(served)
    if not is_behind_gate:
        app.add_middleware(Gate, config=config, keys=keys, error_body=error_body_of, public=PUBLIC.union(other_pages.public))
    for router in (*other_pages.routers, *(api.router() for api in apis)):
        app.include_router(router)
    for kind in (ApiError, BessemerError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer_error)

    # Anthropic's clients send HEAD to see whether a server is there
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
        return described(other_pages.operations)

    @app.get("/metrics")
    async def metrics() -> Response:
        engines = [(model_name, "0", engine), *((model.name, "0", model.engine) for model in served.open_additional)]
        # in a thread: it waits for the engines' current steps
        return Response(await asyncio.to_thread(render_metrics, engines), media_type=CONTENT_TYPE)

    @app.post("/tokenize")
    async def tokenize_text(request: Request) -> dict[str, Any]:
        body = await read_body(TokenizeRequest, request)
        chosen = await served.model_for(body.model or model_name, caller_of(request))
        return await served.run_in_thread(lambda: tokenize(chosen.engine, body))

    @app.post("/detokenize")
    async def detokenize_ids(request: Request) -> dict[str, Any]:
        body = await read_body(DetokenizeRequest, request)
        chosen = await served.model_for(body.model or model_name, caller_of(request))
        return await served.run_in_thread(lambda: detokenize(chosen.engine, body))

    return app


@cache
def described(more: Callable[[], Mapping[tuple[str, str], Operation]] | None = None) -> dict[str, Any]:
    """The OpenAPI document, made at the first request. more: `Pages.operations`."""
    from bessemer.serving.openapi import description

    return description(None if more is None else more())


async def _close_idle_models(pool: ModelPool | None) -> None:
    """Runs until cancelled."""
    while pool is not None:
        await asyncio.sleep(IDLE_CHECK_SECONDS)
        await pool.close_idle()


async def watch_keys(keys: Keys | None) -> None:
    """Read the file of keys again when it has changed, until cancelled."""
    while keys is not None:
        await asyncio.sleep(_REFRESH_SECONDS)
        keys.refresh()


def error_body_of(path: str, error: ApiError) -> dict[str, Any]:
    """An error in the form of the API below `path`."""
    # below /api/v1/ is the Tinker API
    if path.startswith(f"{ollama.PREFIX}/") and not path.startswith(f"{ollama.PREFIX}/v1/"):
        return ollama_error(error)
    return error_body(error) if path.startswith(PREFIX) else error.body()


async def answer_error(request: Request, error: Exception) -> Response:
    """The response to any exception, in the form of the API below the path."""
    path = request.scope["path"]
    headers = None
    match error:
        case HTTPException():
            # an unknown path or method
            api_error = ApiError(f"{request.method} {path}: {error.detail}", status=error.status_code)
            headers = error.headers
        case RequestValidationError():
            # a query parameter of a wrong type
            first = error.errors()[0]
            name = str(first["loc"][-1])
            api_error = ApiError(f"{name}: {first['msg']}", parameter=name, code="invalid_value")
        case ApiError() | BessemerError():
            api_error = as_api_error(error)
            headers = api_error.headers
        case _:
            # a bug, which the server's log shows in full
            api_error = ApiError("the server failed; its log says why", status=500, kind="server_error")
    return JSONResponse(error_body_of(path, api_error), status_code=api_error.status, headers=headers)
