"""Runs the application: a free address, a line that names it, and a stop that does not hang.

A client must send its request's head and read its response in time, or its connection is closed (`ImpatientProtocol`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Any, Protocol

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from bessemer.assistant.hooks import Hook
from bessemer.assistant.tools import Tool
from bessemer.core.chat_client import ChatClient
from bessemer.core.errors import BessemerError, ConfigError
from bessemer.inference.engine import Engine
from bessemer.retrieval.citations import Entails
from bessemer.retrieval.expansion import Expander
from bessemer.retrieval.rerank import Reranker
from bessemer.serving.app import Pages, create_app, no_pages
from bessemer.serving.config import BODY, HEAD_WAIT, LEAST_READ, WRITE_WAIT, ServingConfig
from bessemer.serving.runtime.gate import REQUEST_LOG
from bessemer.serving.runtime.models import ModelPool
from bessemer.serving.runtime.served import Served

#: Seconds for the head of a request, from the moment the connection is idle.
HEAD_SECONDS = float(HEAD_WAIT.most)
#: Seconds in which a client must read `LEAST_READ` bytes of a waiting response, or its rest.
WRITE_SECONDS = float(WRITE_WAIT.most)


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 with time limits on a request's head, and on a client that does not read its response.

    uvicorn waits for both without a limit, while the client's requests hold their admission.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # so that `pause_writing` is called whenever bytes wait to be read
        transport.set_write_buffer_limits(high=0)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        is_between = before is None or before.response_complete
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()
        elif is_between and self._head_timer is None:
            self._await_head()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        # from here on another protocol has the connection
        self._stop_waiting()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _await_reader(self) -> None:
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self._check_reader, self.transport.get_write_buffer_size())

    def _check_reader(self, waiting: int) -> None:
        """End the connection if the client has read too little. waiting: bytes in the buffer at the last check."""
        if waiting - self.transport.get_write_buffer_size() < LEAST_READ:
            self._write_timer = None
            # `close` would wait for the client to read the rest
            self.transport.abort()
        else:
            self._await_reader()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_connection)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_connection(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()


try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

#: Seconds that requests get to finish after Ctrl-C.
_GRACE_SECONDS = 2
#: Seconds that an idle connection is kept: longer than load balancers' usual 60 s, or they would send requests into closing
#: connections.
KEEP_ALIVE_SECONDS = 75
#: Most tokens of an answer to `--ask`.
_ANSWER_TOKENS = 128


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises BessemerError when the port is taken or not allowed, and ConfigError when the host is not an
    address of this machine."""
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
    """The URL of a listening socket, for this machine."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Draining(Protocol):
    """What a server asks of what it serves."""

    @property
    def engine(self) -> Engine:
        """The engine, whose failure stops the server."""

    @property
    def requests(self) -> int:
        """Requests that are being answered."""

    def drain(self) -> None:
        """Begin nothing new."""


class Server(uvicorn.Server):
    """Stops when its engine fails, and after SIGTERM when its requests are finished.

    While draining, `/ready` and new requests get 503, and `/health` 200. A second SIGTERM stops it at once.
    """

    def __init__(self, config: uvicorn.Config, served: Draining, drain_seconds: float) -> None:
        super().__init__(config)
        self._served = served
        self._drain_seconds = drain_seconds
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at SIGTERM; stop at Ctrl-C."""
        if sig != signal.SIGTERM:
            super().handle_exit(sig, frame)
        elif self._drain_until is None:
            self.drain()
        else:
            self.should_exit = self.force_exit = True

    def drain(self) -> None:
        """Refuse new requests; stop when the others have ended, or after `drain_seconds`."""
        self._served.drain()
        self._drain_until = time.monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; called ten times a second."""
        if self._drain_until is not None and (self._served.requests == 0 or time.monotonic() > self._drain_until):
            self.should_exit = True
        return await super().on_tick(counter) or self._served.engine.failure is not None


def create_server(
    engine: Engine,
    model_name: str,
    config: ServingConfig,
    pages: Callable[[Served], Pages] = no_pages,
    pool: ModelPool | None = None,
    hooks: Sequence[Hook] = (),
    reranker: tuple[str, Reranker] | None = None,
    expander: Expander | None = None,
    entails: Entails | None = None,
    server_tools: Callable[[str], Sequence[Tool]] | None = None,
) -> Server:
    """The server, not yet running: `run(sockets=[listener])` starts it, `should_exit = True` stops it. The other arguments are
    those of `create_app`."""
    app = create_app(
        engine,
        model_name,
        config,
        pages,
        pool,
        hooks,
        reranker=reranker,
        expander=expander,
        entails=entails,
        server_tools=server_tools,
    )
    return new_server(app, app.state.served, config.drain_seconds, config.max_body)


def new_server(app: FastAPI, served: Draining, drain_seconds: float, max_message: float = float(BODY.most)) -> Server:
    """A server of any application, not yet running. served: what it drains and watches. max_message: MiB of a message on a
    WebSocket."""
    settings = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        # none where no library of WebSockets is installed
        ws="auto",
        ws_max_size=round(max_message * 2**20),
        ws_per_message_deflate=False,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        # uvloop, uvicorn's default where installed, starves connections while an engine steps fast
        loop="asyncio",
        lifespan="on",
        server_header=False,
    )
    return Server(settings, served, drain_seconds)


def serve(
    engine: Engine,
    model_name: str,
    config: ServingConfig | None = None,
    say: Callable[[str], None] = print,
    pages: Callable[[Served], Pages] = no_pages,
    pool: ModelPool | None = None,
    questions: Sequence[str] = (),
    hooks: Sequence[Hook] = (),
    reranker: tuple[str, Reranker] | None = None,
    expander: Expander | None = None,
    entails: Entails | None = None,
    server_tools: Callable[[str], Sequence[Tool]] | None = None,
) -> None:
    """Serve until interrupted.

    say: prints lines. questions: sent to the API, their answers go to `say`, and then the server stops. The others are those of
    `create_app`. Raises as `listen`, the engine's failure, and BessemerError for a question that fails.
    """
    config = config or ServingConfig()
    open_many_files()
    with listen(config.host, config.port) as listener, request_log(config.request_log):
        server = create_server(
            engine,
            model_name,
            config,
            pages,
            pool,
            hooks,
            reranker=reranker,
            expander=expander,
            entails=entails,
            server_tools=server_tools,
        )
        url = address_of(listener)
        shown = "" if pages is no_pages else f"chat at {url} · "
        say(f"{model_name}: {shown}OpenAI API at {url}/v1 · Ctrl-C stops")
        with ThreadPoolExecutor(max_workers=1) as thread:
            ask = partial(ask_questions, f"{url}/v1", model_name, questions, say)
            asking = thread.submit(_ask_and_stop, server, ask) if questions else None
            try:
                with contextlib.suppress(KeyboardInterrupt):
                    server.run(sockets=[listener])
            finally:
                # `asking` waits for a start, or for this
                server.should_exit = True
            if asking is not None:
                asking.result()
        if engine.failure is not None:
            raise engine.failure


def ask_questions(url: str, model: str, questions: Sequence[str], say: Callable[[str], None]) -> None:
    """Send questions to a server, and print them with their answers. Raises BessemerError where one is not answered."""
    client = ChatClient(url, model, max_tokens=_ANSWER_TOKENS)
    for question in questions:
        (answer,) = client.ask([question])
        say(f"> {question}\n{answer}")


def _ask_and_stop(server: Server, ask: Callable[[], None]) -> None:
    """Call `ask` once the server has started, and then stop it."""
    while not server.started and not server.should_exit:
        time.sleep(0.02)
    try:
        ask()
    finally:
        server.should_exit = True


def open_many_files() -> None:
    """Raise this process's limit of open files, usually 1,024, as far as the machine allows."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def request_log(is_wanted: bool) -> Generator[None, None, None]:
    """Write the log of requests to standard error."""
    log = logging.getLogger(REQUEST_LOG)
    if not is_wanted:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    level, log.propagate = log.level, False
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = True
