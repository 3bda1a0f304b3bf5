from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest

from tests.assistant.conftest import tagged_tokenizer, thinking_tokenizer, tokenizer  # noqa: F401
from tests.serving.engine import FakeEngine
from tests.serving.running import servers

Start = Callable[..., str]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a real server on a free port: `start(engine, **settings)` gives its URL; made: a list that takes the server."""
    with servers() as start:
        yield start


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
