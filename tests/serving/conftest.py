from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import openai
import pytest

from bessemer.serving.config import ServingConfig
from bessemer.serving.server import address_of, create_server, listen
from tests.serving.engine import FakeEngine

Start = Callable[..., str]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a real server on a free port: `start(engine, **settings)` gives its URL; made: a list that takes the server."""
    running = []

    def start_server(engine: FakeEngine, made: list | None = None, **settings) -> str:
        listener = listen("127.0.0.1", 0)
        server = create_server(engine, "tiny", ServingConfig(**settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread))
        if made is not None:
            made.append(server)
        return address_of(listener)

    yield start_server
    for server, thread in running:
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.fixture
def client(start) -> Iterator[openai.OpenAI]:
    """The official client of a server whose model echoes the last line."""
    with openai.OpenAI(base_url=start(FakeEngine()) + "/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def connected(start) -> Iterator[Callable]:
    """Official clients of servers: `connected(kind, engine, path="/v1", **settings)`."""
    clients = []

    def connect(kind, engine, path="", **settings):
        url = start(engine, **settings) + path
        clients.append(kind(base_url=url, api_key=settings.get("api_key", "any"), max_retries=0))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()
