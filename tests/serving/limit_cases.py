"""Requests at a multiple of each of a server's limits, for tests and for `benchmarks/server_limits.py`."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from bessemer.serving import config as limits
from bessemer.serving.config import LIMITS

#: Limits that no single request comes to: of times, and of what many requests leave behind.
OF_MANY = {
    *("BODY_WAIT", "HEAD_WAIT", "WRITE_WAIT", "BODIES", "QUEUED", "QUEUE_WAIT", "STORED", "STORED_BYTES"),
    *("UPLOADS", "UPLOADED_BYTES", "STORES", "SOCKETS", "SOCKET_IDLE", "SUMMARY"),
}
#: What is sent of each limit.
FACTORS = (1, 10)


@dataclass(frozen=True)
class Sent:
    """A request: its path and body, and how many of it at once."""

    path: str
    body: bytes
    times: int = 1


@dataclass
class Seen:
    """What came while requests were sent: their statuses, those of a second client, and its slowest answer in seconds."""

    statuses: list[int] = field(default_factory=list)
    others: list[int] = field(default_factory=list)
    health: float = 0.0
    chat: float = 0.0


def _chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1, **more}


def _sent(path: str, body: dict[str, Any], times: int = 1) -> Sent:
    return Sent(path, json.dumps(body).encode(), times)


def _with_images(count: int) -> list[dict[str, Any]]:
    """One message with pictures of one pixel."""
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixel}"}}
    return [{"role": "user", "content": [part] * count}]


def _words(characters: int) -> str:
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randrange(2, 9))) for _ in range(1000)]
    return " ".join(draw.choices(words, k=characters // 3))[:characters]


def _body(model: str, count: int) -> Sent:
    text = json.dumps(_chat(model)).encode()
    return Sent("/v1/chat/completions", text + b" " * (count * 2**20 - len(text)))


def _many_values(model: str, count: int) -> Sent:
    return Sent("/detokenize", b'{"tokens": [' + b"1," * (count - 3) + b"1]}")


def _lists(model: str, count: int) -> Sent:
    text = json.dumps(_chat(model, metadata=0)).encode()
    return Sent("/v1/chat/completions", text.replace(b'"metadata": 0', b'"metadata": [' + b"[]," * (count - 5) + b"[]]"))


def _tools(model: str, count: int) -> Sent:
    tools = [{"type": "function", "function": {"name": f"f{place}"}} for place in range(count)]
    return _sent("/v1/chat/completions", _chat(model, tools=tools))


def _completion(model: str, **more: Any) -> Sent:
    return _sent("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 2, **more})


def _response(model: str, metadata: dict[str, str]) -> Sent:
    return _sent("/v1/responses", {"model": model, "input": "a", "max_output_tokens": 1, "metadata": metadata})


_CONDITION = {"type": "eq", "key": "a", "value": 1}


def _retrieval(model: str, **more: Any) -> Sent:
    return _sent("/v1/chat/completions", _chat(model, retrieval=more))


#: Of each limit, the request that comes to a count.
CASES: dict[str, Callable[[str, int], Sent]] = {
    "BODY": _body,
    "VALUES": _many_values,
    "CONTAINERS": _lists,
    "NAME": lambda model, count: _sent("/v1/chat/completions", _chat("x" * count)),
    "FIELDS": lambda model, count: _sent("/v1/completions", {f"x{place}": 1 for place in range(count)}),
    "MESSAGES": lambda model, count: _sent(
        "/v1/chat/completions", _chat(model) | {"messages": _chat(model)["messages"] * count}
    ),
    "TOOLS": _tools,
    "CHOICES": lambda model, count: _sent("/v1/chat/completions", _chat(model, n=count)),
    "ANSWERS": lambda model, count: _completion(model, prompt=["a"] * count),
    "LIKELIEST": lambda model, count: _completion(model, logprobs=count),
    "STOPS": lambda model, count: _completion(model, stop=[f"{place:x}"[:16] for place in range(count)]),
    "STOP_CHARACTERS": lambda model, count: _completion(model, stop=["a" * (count // 64 - 1) + chr(65 + n) for n in range(64)]),
    "STOP_TOKENS": lambda model, count: _completion(model, stop_token_ids=[1] * count),
    "TOKEN_RULES": lambda model, count: _completion(model, n=64, allowed_token_ids=list(range(9, 60)) * (count // 51)),
    "IMAGES": lambda model, count: _sent("/v1/chat/completions", _chat(model, messages=_with_images(count))),
    "EMBEDDED": lambda model, count: _sent("/v1/embeddings", {"model": model, "input": ["a b"] * count}),
    "ENCODED": lambda model, count: _sent("/tokenize", {"model": model, "prompt": _words(count)}),
    "METADATA": lambda model, count: _response(model, {f"x{place}": "x" for place in range(count)}),
    "METADATA_KEY": lambda model, count: _response(model, {"x" * count: "x"}),
    "METADATA_VALUE": lambda model, count: _response(model, {"x": "x" * count}),
    "SEARCHED_STORES": lambda model, count: _retrieval(model, vector_store_ids=["docs"] * count),
    "RESULTS": lambda model, count: _retrieval(model, max_num_results=count),
    "QUERIES": lambda model, count: _sent("/v1/vector_stores/docs/search", {"query": ["a"] * count}),
    "FILTERS": lambda model, count: _retrieval(model, filters={"type": "or", "filters": [_CONDITION] * count}),
    "BATCHED": lambda model, count: _sent("/v1/vector_stores", {"file_ids": [f"file-{place}" for place in range(count)]}),
    "RERANKED": lambda model, count: _sent("/v1/rerank", {"model": model, "query": "a", "documents": ["b"] * count}),
    "WAITING": lambda model, count: _completion(model, prompt=["a"] * count, max_tokens=8),
    "ASIDE": lambda model, count: _sent("/tokenize", {"model": model, "prompt": _words(100_000)}, count),
}


def case_of(name: str, factor: int, model: str, most_at_once: int) -> Sent:
    """The request at a multiple of a limit. most_at_once: the most completions of one request."""
    most = {"WAITING": most_at_once}.get(name, LIMITS[name].most)
    return CASES[name](model, factor * most)


def long_prompt(model: str) -> Sent:
    """A conversation of 7 MB, which fits no context."""
    messages = [{"role": "user", "content": _words(7_000_000)}]
    return _sent("/v1/chat/completions", {"model": model, "messages": messages})


async def send_beside_another(url: str, model: str, sent: Sent, timeout: float = 120.0) -> Seen:
    """Send a request, and meanwhile look at `/health` and chat as another client does."""
    seen = Seen()
    headers = {"content-type": "application/json"}
    async with (
        httpx.AsyncClient(base_url=url, timeout=timeout) as one,
        httpx.AsyncClient(base_url=url, timeout=timeout) as other,
    ):

        async def ask() -> None:
            answers = [one.post(sent.path, content=sent.body, headers=headers) for _ in range(sent.times)]
            seen.statuses += [answer.status_code for answer in await asyncio.gather(*answers)]

        async def look() -> None:
            while True:
                started = time.perf_counter()
                seen.others.append((await other.get("/health")).status_code)
                seen.health = max(seen.health, time.perf_counter() - started)
                await asyncio.sleep(0.005)

        async def chat() -> None:
            while True:
                started = time.perf_counter()
                seen.others.append((await other.post("/v1/chat/completions", json=_chat(model))).status_code)
                seen.chat = max(seen.chat, time.perf_counter() - started)
                await asyncio.sleep(0.005)

        beside = [asyncio.create_task(look()), asyncio.create_task(chat())]
        # both have begun
        await asyncio.sleep(0.01)
        await ask()
        # what was asked meanwhile is answered
        answered = len(seen.others)
        while len(seen.others) < answered + 4 and not any(one.done() for one in beside):
            await asyncio.sleep(0.005)
        for task in beside:
            task.cancel()
        for found in await asyncio.gather(*beside, return_exceptions=True):
            if not isinstance(found, asyncio.CancelledError):
                assert isinstance(found, BaseException)
                raise found
    return seen


def waits() -> set[str]:
    """Limits that are no multiple of a request."""
    return set(limits.LIMITS) - set(CASES)
