"""The Tinker server: its application, behind the gate of hosts, origins and keys that serving has, and how it is run.

The gate accepts the header `x-api-key`, which Tinker's client sends. That client wants keys that begin with `tml-`, so a key of
this server is also accepted with `tml-` before it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version as package_version
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from bessemer.core.errors import BessemerError
from bessemer.serving.app import answer_error, watch_keys
from bessemer.serving.config import ServingConfig
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import Keys
from bessemer.serving.runtime.gate import PUBLIC, Gate
from bessemer.serving.server import Server, address_of, listen, new_server, open_many_files, request_log
from bessemer.serving.tinker.api import PREFIX, TinkerApi
from bessemer.serving.tinker.service import TinkerService


def create_tinker_app(service: TinkerService, config: ServingConfig | None = None) -> FastAPI:
    """An application that serves the Tinker API. Raises as `create_app` for a file of keys."""
    config = config or ServingConfig()
    asks_for_keys = config.keys is not None or config.api_key is not None
    keys = Keys(config.keys, config.api_key) if asks_for_keys else None

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(watch_keys(keys)), asyncio.create_task(service.keep_up())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            service.close()

    app = FastAPI(title="Bessemer", docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    app.state.served = service
    app.add_middleware(
        Gate,
        config=config,
        keys=keys,
        error_body=lambda path, error: error.body(),
        public=PUBLIC.union((f"{PREFIX}/healthz",)),
    )
    app.include_router(TinkerApi(service).router())
    for kind in (ApiError, BessemerError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer_error)

    @app.get("/")
    async def about() -> dict[str, str]:
        return {"name": "bessemer", "version": package_version("bessemer"), "model": service.name, "api": "tinker"}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": service.name, "requests": service.requests}

    return app


def serve_tinker(service: TinkerService, config: ServingConfig | None = None, say: Callable[[str], None] = print) -> None:
    """Serve until interrupted. say: prints lines. Raises as `listen`."""
    config = config or ServingConfig()
    open_many_files()
    with listen(config.host, config.port) as listener, request_log(config.request_log):
        server = new_tinker_server(service, config)
        url = address_of(listener)
        say(f"{service.name}: Tinker API at {url} · Ctrl-C stops")
        say(f"clients: export TINKER_BASE_URL={url} TINKER_API_KEY={_key_of(config)}")
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def new_tinker_server(service: TinkerService, config: ServingConfig) -> Server:
    """The server, not yet running."""
    return new_server(create_tinker_app(service, config), service, config.drain_seconds)


def _key_of(config: ServingConfig) -> str:
    """The value of TINKER_API_KEY for a client of this server."""
    return "tml-KEY" if config.keys is not None or config.api_key is not None else "tml-any"
