"""Completions for event loops: the asynchronous half of the engine."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial

from bessemer.core.errors import RequestError
from bessemer.inference.request import Chunk, Completion, Prompt, Prompts, Request, completion_of
from bessemer.inference.request_builder import as_prompts, check_streamed, for_each
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.step_driver import StepDriver
from bessemer.tokenization.chat import Message, Tool
from bessemer.tokenization.tokenizer import Tokenizer


class AsyncGeneration(ABC):
    """`agenerate`, `astream` and `astream_chat`, for an engine that prepares requests and has a driver.

    Requests of any number of event loops, each in a thread of its own, share steps with each other and with callers that use
    no event loop. A thread steps while any of them is in flight; no event loop waits for a step. A slow reader finds its chunks
    waiting, and holds up no other. Requests stop when their task is cancelled, their generator is closed or their event loop is
    closed: their blocks are free after the step under way.
    """

    tokenizer: Tokenizer
    _driver: StepDriver

    @property
    @abstractmethod
    def default_params(self) -> SamplingParams:
        """What a call without parameters takes."""

    @abstractmethod
    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        """A request that has not begun. Any thread may ask for it."""

    async def agenerate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        adapter: str | Sequence[str | None] | None = None,
        cache_salt: str | None = None,
    ) -> list[Completion]:
        """As `generate`. Raises RequestError for beam search too, which has no asynchronous form."""
        prompts, params = as_prompts(prompts), self.default_params if params is None else params
        each, adapters = for_each(prompts, params, "params"), for_each(prompts, adapter, "adapters")
        if any(one.beam_width for one in each):
            raise RequestError("beam search has no asynchronous form: leave out beam_width, or call generate on another thread")

        def prepare_all() -> list[Request]:
            return [
                self.prepare(prompt, one, priority=priority, adapter=name, cache_salt=cache_salt)
                for prompt, one, name in zip(prompts, each, adapters, strict=True)
            ]

        requests = await asyncio.to_thread(prepare_all)
        await self._driver.finish(requests)
        return [completion_of(request, one) for request, one in zip(requests, each, strict=True)]

    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of `stream`. Nothing begins before the first is asked for.

        Raises RequestError at once for more than one completion, and at the first chunk for a prompt that does not fit or an
        unknown adapter: the prompt is read on another thread.
        """
        params = self.default_params if params is None else params
        check_streamed(params)
        return self._chunks(partial(self.prepare, prompt, params, priority=priority, adapter=adapter, cache_salt=cache_salt))

    def astream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        tools: Sequence[Tool] | None = None,
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of `stream_chat`. Raises as `astream`, and for a malformed message or tool as for a prompt."""
        params = self.default_params if params is None else params
        check_streamed(params)

        def prepare() -> Request:
            prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools)
            return self.prepare(prompt, params, adapter=adapter, cache_salt=cache_salt)

        return self._chunks(prepare)

    async def _chunks(self, prepare: Callable[[], Request]) -> AsyncGenerator[Chunk, None]:
        request = await asyncio.to_thread(prepare)
        async with aclosing(self._driver.chunks([request])) as news:
            async for chunks in news:
                for _, chunk in chunks:
                    yield chunk
