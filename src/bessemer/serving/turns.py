"""Generations under way take turns on one thread.

The engine is touched by a single worker thread, so it needs no locks and the event loop never waits for it. A turn is
a few hundredths of a second of one generation; the thread's queue is first in, first out, so generations under way
alternate and every client sees text flow. Requests beyond `max_active` wait, beyond `max_waiting` they are refused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from bessemer.inference.engine import Chunk
from bessemer.inference.sampling import SamplingParams
from bessemer.serving.protocol import ApiError
from bessemer.tokenization.tokenizer import Tokenizer

#: Seconds of one turn: short enough that eight streams still look like streams, long beside a thread's wake-up.
_TURN_SECONDS = 0.02
#: What a refused client is told to wait, in seconds.
_RETRY_AFTER = 1

Result = TypeVar("Result")


class TextEngine(Protocol):
    """What the server asks of an engine; `bessemer.inference.engine.Engine` is one."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together."""

    def stream(self, prompt: list[int], params: SamplingParams) -> Generator[Chunk, None, None]:
        """Generate from token ids; the last chunk carries the finish reason, closing the generator stops the work."""


class Turns:
    """One worker thread and the line in front of it."""

    def __init__(self, engine: TextEngine, max_active: int, max_waiting: int) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._places = asyncio.Semaphore(max_active)
        self._limit = max_active + max_waiting
        self.admitted = 0

    async def _call(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def generate(self, prompt: list[int], params: SamplingParams) -> AsyncGenerator[list[Chunk], None]:
        """The chunks of one generation, a turn's at a time.

        The first item is an empty list, given at once when the request is admitted: until it is taken no place in
        the line is held, afterwards closing or cancelling this generator frees it and stops the engine's work.
        Raises ApiError (503) when the line is full.
        """
        if self.admitted >= self._limit:
            raise ApiError(
                f"the server is busy with {self.admitted} requests; try again in a moment",
                status=503,
                kind="server_error",
                code="server_overloaded",
                headers={"Retry-After": str(_RETRY_AFTER)},
            )
        self.admitted += 1
        try:
            yield []
            async with self._places:
                chunks = await self._call(lambda: self._engine.stream(prompt, params))
                try:
                    finished = False
                    while not finished:
                        taken, finished = await self._call(lambda: _turn(chunks))
                        yield taken
                finally:
                    self._thread.submit(chunks.close)
        finally:
            self.admitted -= 1


def _turn(chunks: Generator[Chunk, None, None]) -> tuple[list[Chunk], bool]:
    """The chunks of one turn, and whether they were the last."""
    end = time.monotonic() + _TURN_SECONDS
    taken = []
    for chunk in chunks:
        taken.append(chunk)
        if time.monotonic() >= end:
            return taken, False
    return taken, True
