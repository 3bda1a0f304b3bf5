"""Runs the application: a free address, a line that names it, and a stop that does not hang."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable

import uvicorn

from bessemer.core.errors import BessemerError, ConfigError
from bessemer.serving.app import create_app
from bessemer.serving.config import ServingConfig
from bessemer.serving.worker import TextEngine

#: Seconds that in-flight requests get to finish when the server is stopped.
_GRACE_SECONDS = 2


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections from now on. Raises BessemerError when the port is taken or not allowed, and
    ConfigError when the host is not an address of this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BessemerError(f"port {port} on {host} is in use; stop what holds it or choose another with --port") from None
        if error.errno == errno.EACCES:
            raise BessemerError(f"port {port} on {host} needs more rights; choose one above 1023 with --port") from None
        raise ConfigError(f"cannot listen on host {host!r}: {error.strerror}; 127.0.0.1 is this machine") from None


def address_of(listener: socket.socket) -> str:
    """The URL at which a listening socket is reached from this machine."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """Stops by itself when its engine can serve no more."""

    def __init__(self, config: uvicorn.Config, engine: TextEngine) -> None:
        super().__init__(config)
        self._engine = engine

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._engine.failure is not None


def create_server(engine: TextEngine, model_name: str, config: ServingConfig) -> uvicorn.Server:
    """The server, not yet running: `run(sockets=[listener])` starts it, `should_exit = True` stops it."""
    app = create_app(engine, model_name, config)
    return _Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_SECONDS, lifespan="on"),
        engine,
    )


def serve(engine: TextEngine, model_name: str, config: ServingConfig | None = None, say: Callable[[str], None] = print) -> None:
    """Serve until interrupted. `say` is given the address once it answers.

    Raises as `listen`, and the engine's failure when it can answer no more.
    """
    config = config or ServingConfig()
    with listen(config.host, config.port) as listener:
        server = create_server(engine, model_name, config)
        url = address_of(listener)
        say(f"{model_name}: chat at {url} · OpenAI API at {url}/v1 · Ctrl-C stops")
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
        if engine.failure is not None:
            raise engine.failure
