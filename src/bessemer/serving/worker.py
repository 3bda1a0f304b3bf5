"""The engine behind the application: admission, and the engine's errors as the API's.

A thread steps the engine while any request is in flight (`bessemer.inference.step_driver`), and the event loop never waits for
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from bessemer.core.errors import BessemerError
from bessemer.inference.capture import Capture
from bessemer.inference.request import Completion, Request
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.statistics import EngineStatistics
from bessemer.inference.step_driver import ChoiceChunk, StepDriver, SteppedEngine
from bessemer.model.decoder import Decoder
from bessemer.serving import limits
from bessemer.serving.bodies import ApiError
from bessemer.serving.clients import Caller
from bessemer.tokenization.tokenizer import Tokenizer

#: What a refused client is told to wait, in seconds.
_RETRY_AFTER = 1


class TextEngine(SteppedEngine, Protocol):
    """The engine as the server uses it; `bessemer.inference.engine.Engine` is one."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and completion together."""

    @property
    def longest(self) -> int:
        """The most tokens of prompt and completion together that the memory holds, at most the context."""

    @property
    def max_num_seqs(self) -> int:
        """Sequences that are computed at once."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""

    @property
    def statistics(self) -> EngineStatistics:
        """Counts and times, between two steps."""

    @property
    def failure(self) -> BessemerError | None:
        """Why it can serve no more; None while it can."""

    @property
    def model(self) -> Decoder:
        """The model, whose norm and head read what was captured."""

    def prepare(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
        capture: Capture | None = None,
    ) -> Request:
        """A request of token ids that has not begun; any thread may ask. RequestError for what is known to be wrong."""

    def close(self) -> None:
        """Give back what it holds."""

    def load_adapter(self, name: str, adapter: Path) -> None:
        """Let requests name the adapter in a folder. ArtefactError for a folder without one that fits the model."""

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter. RequestError for one that is not loaded."""

    def embed(self, prompts: Sequence[list[int]], *, adapter: str | None = None) -> Tensor:
        """A vector of length 1 of each prompt, (N, D) float32; any thread may ask."""

    def completion(self, request: Request, params: SamplingParams) -> Completion:
        """The completion of a request that is done, as its parameters ask for it."""


class Worker:
    """Admission to an engine, and the requests that were admitted.

    As many completions as the engine computes at once are admitted, and `max_waiting` more; of one request fewer, so that it
    leaves places to others. An error reaches the requests that it concerns; once the engine's thread has ended by one, every
    request is refused with the reason.
    """

    def __init__(self, engine: TextEngine, max_waiting: int) -> None:
        self._engine = engine
        self._driver = StepDriver(engine)
        self._limit = engine.max_num_seqs + max_waiting
        #: The most completions of one request.
        self.most_at_once = self._limit - max_waiting // limits.OTHERS_SHARE
        #: API requests that were admitted and are not over.
        self.requests = 0
        #: Completions that they asked for.
        self.completions = 0
        #: Whether nothing new is begun, because the server is about to stop.
        self.is_draining = False

    @property
    def failure(self) -> Exception | None:
        """Why no request can be served any more; None while they can."""
        return self._engine.failure or self._driver.failure

    @contextlib.contextmanager
    def admit(self, completions: int) -> Generator[None, None, None]:
        """Admission for as long as the context lasts.

        Raises ApiError: 400 for more completions than are ever admitted at once, 503 when there is no place for them now or the
        server can serve no more.
        """
        if (failure := self.failure) is not None:
            raise ApiError(str(failure), status=503, kind="server_error")
        if self.is_draining:
            raise _busy("the server is stopping; another one may answer")
        if completions > self.most_at_once:
            raise ApiError(
                f"the request asks for {completions:,} completions, and this server computes at most {self.most_at_once:,} of "
                "one request; ask for fewer at once"
            )
        if self.completions + completions > self._limit:
            raise _busy(f"the server is busy with {self.requests} requests; try again in a moment")
        self.requests += 1
        self.completions += completions
        try:
            yield
        finally:
            self.requests -= 1
            self.completions -= completions

    async def chunks(self, requests: Sequence[Request], caller: Caller) -> AsyncGenerator[list[ChoiceChunk], None]:
        """Chunks of prepared requests and their siblings, as they come; of several steps at once where the client is slow.

        The tokens are counted for `caller`, and an admission is held meanwhile. Nothing is begun before the first item is asked
        for; closing or cancelling it ends the requests. Raises a request's own BessemerError, or ApiError.
        """
        caller.spend(prompt=sum(request.prompt_tokens for request in requests))
        with self._api_errors():
            async with contextlib.aclosing(self._driver.chunks(requests)) as news:
                async for chunks in news:
                    caller.spend(completion=sum(len(one.chunk.token_ids) for one in chunks))
                    yield chunks

    async def complete(self, requests: Sequence[Request], params: SamplingParams, caller: Caller) -> list[Completion]:
        """The completions of prepared requests and their siblings, one with its `others` for each request. Cancelling it ends
        them. Counts and raises as `chunks`."""
        caller.spend(prompt=sum(request.prompt_tokens for request in requests))
        with self._api_errors():
            await self._driver.finish(requests)
        completions = [self._engine.completion(request, params) for request in requests]
        caller.spend(completion=sum(one.completion_tokens for first in completions for one in (first, *first.others)))
        return completions

    def close(self) -> None:
        """End all in-flight requests, and the thread after the step it is in."""
        self._driver.close(ApiError("the server is stopping", status=503, kind="server_error"))

    @contextlib.contextmanager
    def _api_errors(self) -> Generator[None, None, None]:
        """Tell a client what it may know: a fault of ours is shown in full only in the log."""
        try:
            yield
        except ApiError:
            raise
        except Exception as error:
            if error is self._driver.failure:
                raise ApiError(str(error), status=503, kind="server_error") from None
            if isinstance(error, BessemerError):
                raise
            raise ApiError("the server failed; its log says why", status=500, kind="server_error") from None


def _busy(reason: str) -> ApiError:
    return ApiError(
        reason, status=503, kind="server_error", code="server_overloaded", headers={"Retry-After": str(_RETRY_AFTER)}
    )
