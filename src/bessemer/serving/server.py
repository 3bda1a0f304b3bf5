"""Runs the application: a free address, a line that names it, and a stop that does not hang.

A client must send its request's head and read its response in time, or its connection is closed (`ImpatientProtocol`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bessemer.assistant.hooks import Hook
from bessemer.core.chat_client import ChatClient
from bessemer.core.errors import BessemerError, ConfigError
from bessemer.serving import config as limits
from bessemer.serving.app import Pages, create_app, no_pages
from bessemer.serving.config import ServingConfig
from bessemer.serving.runtime.gate import REQUEST_LOG
from bessemer.serving.runtime.models import Shelf
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.worker import TextEngine

#: Seconds for the head of a request, from the first moment that one is waited for.
HEAD_SECONDS = float(limits.HEAD_WAIT.most)
#: Seconds in which a client must read `limits.LEAST_READ` bytes of what waits for it, or all of it.
WRITE_SECONDS = float(limits.WRITE_WAIT.most)


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 with a limit on the time that the head of a request takes, and on the time that an answer waits to be read.

    uvicorn waits forever for the first request of a connection, for the rest of a head that has begun, and for a client to
    read, whose requests hold their places meanwhile.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # `pause_writing` is then called whenever anything waits to be read
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
        """End a connection whose client has read too little since `waiting` bytes waited for it."""
        if waiting - self.transport.get_write_buffer_size() < limits.LEAST_READ:
            self._write_timer = None
            # to close it would wait for the rest to be read
            self.transport.abort()
        else:
            self._await_reader()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._let_go)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _let_go(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()


try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

#: Seconds that in-flight requests get to finish when the server is stopped.
_GRACE_SECONDS = 2
#: For which an idle connection is kept: longer than load balancers keep theirs (60 s), so that none sends a request on one that
#: is just being closed.
KEEP_ALIVE_SECONDS = 75
#: Most tokens of an answer to a question that the server is asked at its start.
_ANSWER_TOKENS = 128


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


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_of(listener: socket.socket) -> str:
    """The URL at which a listening socket is reached from this machine."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Stops by itself when its engine can serve no more, and after SIGTERM when its requests have been answered.

    While it drains it still listens: `/ready` and new requests get 503, `/health` 200. A second SIGTERM ends it at once.
    """

    def __init__(self, config: uvicorn.Config, served: Served, drain_seconds: float) -> None:
        super().__init__(config)
        self._served = served
        self._drain_seconds = drain_seconds
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. Ctrl-C stops without draining."""
        if sig != signal.SIGTERM:
            super().handle_exit(sig, frame)
        elif self._drain_until is None:
            self.drain()
        else:
            self.should_exit = self.force_exit = True

    def drain(self) -> None:
        """Begin no request any more, and stop when those under way have ended, or their time has."""
        self._served.drain()
        self._drain_until = time.monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        if self._drain_until is not None and (self._served.requests == 0 or time.monotonic() > self._drain_until):
            self.should_exit = True
        return await super().on_tick(counter) or self._served.engine.failure is not None


def create_server(
    engine: TextEngine,
    model_name: str,
    config: ServingConfig,
    pages: Callable[[Served], Pages] = no_pages,
    shelf: Shelf | None = None,
    hooks: Sequence[Hook] = (),
) -> Server:
    """The server, not yet running: `run(sockets=[listener])` starts it, `should_exit = True` stops it. pages, shelf, hooks: as
    for `create_app`."""
    app = create_app(engine, model_name, config, pages, shelf, hooks)
    settings = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        # with uvloop, which uvicorn takes where it is installed, an engine that is never slow keeps it from its connections
        loop="asyncio",
        lifespan="on",
        server_header=False,
    )
    return Server(settings, app.state.served, config.drain_seconds)


def serve(
    engine: TextEngine,
    model_name: str,
    config: ServingConfig | None = None,
    say: Callable[[str], None] = print,
    pages: Callable[[Served], Pages] = no_pages,
    shelf: Shelf | None = None,
    questions: Sequence[str] = (),
) -> None:
    """Serve until interrupted. `say` is given the address once it answers. pages, shelf: as for `create_app`. questions: asked
    through the API as any client would, and answered to `say`; after the last one the server stops.

    Raises as `listen`, the engine's failure when it can answer no more, and what a question ends in.
    """
    config = config or ServingConfig()
    open_many_files()
    with listen(config.host, config.port) as listener, request_log(config.request_log):
        server = create_server(engine, model_name, config, pages, shelf)
        url = address_of(listener)
        shown = "" if pages is no_pages else f"chat at {url} · "
        say(f"{model_name}: {shown}OpenAI API at {url}/v1 · Ctrl-C stops")
        asking = _Asking(server, f"{url}/v1", model_name, questions, say) if questions else None
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
        if asking is not None:
            asking.finish()
        if engine.failure is not None:
            raise engine.failure


def ask_questions(url: str, model: str, questions: Sequence[str], say: Callable[[str], None]) -> None:
    """Ask a server as any client would, and tell question and answer. Raises BessemerError for one that does not answer."""
    client = ChatClient(url, model, max_tokens=_ANSWER_TOKENS)
    for question in questions:
        (answer,) = client.ask([question])
        say(f"> {question}\n{answer}")


class _Asking:
    """Questions to a server of this process, from a thread beside it, which then stops the server."""

    def __init__(self, server: Server, url: str, model: str, questions: Sequence[str], say: Callable[[str], None]) -> None:
        self._server = server
        self._ask = partial(ask_questions, url, model, questions, say)
        self._problem: BessemerError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for its end. Raises what a question ended in."""
        self._thread.join()
        if self._problem is not None:
            raise self._problem

    def _run(self) -> None:
        while not self._server.started and not self._server.should_exit:
            time.sleep(0.02)
        try:
            self._ask()
        except BessemerError as error:
            self._problem = error
        finally:
            self._server.should_exit = True


def open_many_files() -> None:
    """Let this process have as many connections as the machine allows it; the usual limit is 1,024 files."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def request_log(is_wanted: bool) -> Generator[None, None, None]:
    """The lines of requests go to standard error."""
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
