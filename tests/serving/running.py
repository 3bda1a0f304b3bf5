"""Real servers on free ports, which are stopped in the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn.server

from bessemer.inference.engine import Engine, EngineConfig
from bessemer.model.storage.folder import save_model
from bessemer.serving.app import Pages, no_pages
from bessemer.serving.config import ServingConfig
from bessemer.serving.runtime.served import Served
from bessemer.serving.server import Server, address_of, create_server, listen
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

#: Seconds after which a server looks again whether it is to stop; with uvicorn's 0.1 the stops are half of these tests' time.
_TICK = 0.02


async def _short_sleep(seconds: float) -> None:
    await asyncio.sleep(min(seconds, _TICK))


@contextmanager
def quick_stops() -> Iterator[None]:
    """While entered, servers stop as soon as they are told to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": _short_sleep}))
        yield


def babbling_engine(folder: Path, context: int = 512, **settings) -> Engine:
    """A real engine of a tiny model that has learned nothing, which is written to a folder."""
    tokenizer = write_small_tokenizer(folder / "tokenizer")
    shape = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE, max_position_embeddings=context)
    save_model(random_decoder(shape), folder / "model", tokenizer=tokenizer)
    return Engine(folder / "model", device="cpu", config=EngineConfig(**settings))


@contextmanager
def servers() -> Iterator[Callable[..., str]]:
    """Starts servers: `start(engine, pages, **settings)` gives a URL; made: a list that takes the server."""
    running: list[tuple[Server, threading.Thread]] = []

    def start(
        engine,
        pages: Callable[[Served], Pages] = no_pages,
        made: list | None = None,
        pool=None,
        hooks=(),
        reranker=None,
        entails=None,
        server_tools=None,
        **settings,
    ) -> str:
        listener = listen("127.0.0.1", 0)
        config = ServingConfig(**settings)
        server = create_server(engine, "tiny", config, pages, pool, hooks, reranker, entails=entails, server_tools=server_tools)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread))
        if made is not None:
            made.append(server)
        return address_of(listener)

    with quick_stops():
        yield start
        for server, _ in running:
            server.should_exit = True
        for _, thread in running:
            thread.join(timeout=10)
    for _, thread in running:
        assert not thread.is_alive()
