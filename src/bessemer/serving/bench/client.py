"""One request of a load test: a streamed answer, with the times at which its parts came."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass
class Answer:
    """What came of a request. Times in seconds of one clock.

    first: when its first text came, of the answer, of thinking or of a call; gaps: between the parts from then on. tokens: as
    the server counts them; where it counts none, the parts.
    """

    started: float
    first: float | None = None
    ended: float | None = None
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None

    @property
    def seconds(self) -> float:
        """From the request to its end."""
        assert self.ended is not None
        return self.ended - self.started

    @property
    def time_to_first_token(self) -> float:
        """From the request to the first text."""
        assert self.first is not None
        return self.first - self.started

    @property
    def time_per_token(self) -> float:
        """Mean time of the tokens after the first; 0 of an answer of one."""
        return (self.seconds - self.time_to_first_token) / (self.tokens - 1) if self.tokens > 1 else 0.0


async def ask(client: httpx.AsyncClient, api: str, body: dict[str, Any], timeout: float | None = None) -> Answer:
    """Send a request and read its stream to the end. Whatever goes wrong is the answer's `error`. timeout: seconds for all of
    it."""
    answer = Answer(time.perf_counter())
    try:
        async with asyncio.timeout(timeout):
            await _read(client, api, body, answer)
    except TimeoutError:
        answer.error = f"not answered in {timeout:g} s"
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, AttributeError) as error:
        # a stream that is no stream of completions has any shape
        answer.error = str(error) or type(error).__name__
    return answer


async def _read(client: httpx.AsyncClient, api: str, body: dict[str, Any], answer: Answer) -> None:
    parts = 0
    async with client.stream("POST", _PATHS[api], json=body) as response:
        if response.status_code != 200:
            answer.error = f"{response.status_code}: {_reason(await response.aread())}"
            return
        waiting, latest = b"", None
        async for received in response.aiter_raw():
            now = time.perf_counter()
            *events, waiting = (waiting + received).split(b"\n")
            for event in events:
                data = event.removeprefix(b"data:").strip()
                if not event.startswith(b"data:") or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    answer.error = _reason(data)
                    return
                if usage := chunk.get("usage"):
                    answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
                if not _has_text(chunk):
                    continue
                parts += 1
                if latest is None:
                    answer.first = now
                else:
                    answer.gaps.append(now - latest)
                latest = now
    answer.ended = time.perf_counter()
    answer.tokens = answer.tokens or parts
    if answer.first is None and answer.tokens:
        # tokens without a text of their own, as control tokens are
        answer.first = answer.ended
    elif answer.first is None:
        answer.error = "an empty answer"


def _has_text(chunk: dict[str, Any]) -> bool:
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or choice
        if any(delta.get(name) for name in ("content", "text", "reasoning", "reasoning_content", "tool_calls")):
            return True
    return False


def _reason(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
