"""A copy of the served model in float32, in which heads are recorded, silenced and patched, while the served one goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from bessemer.core.environment import free_memory_bytes
from bessemer.core.errors import BessemerError, RequestError
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.quantised_decoder import dequantised, set_dtype
from bessemer.model.storage.tuned_folder import load_whole, tuned_model
from bessemer.model.vision.folder import is_vision_folder, load_vision_language
from bessemer.serving.runtime.bodies import ApiError, overloaded
from bessemer.serving.runtime.clients import caller_of
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.streams import (
    as_api_error,
    client_left_response,
    server_sent_event,
    until_client_leaves,
)

#: Most tokens of a sentence of which attention is drawn as tokens × tokens, and of a prompt that is read alone.
LONGEST, LONGEST_PROMPT = 512, 2048
#: Requests that run or wait; they take seconds each, one after the other.
_MOST_AT_ONCE = 8
_GIB = 2**30

#: Raises when the client has left; called now and then.
Check = Callable[[], None]
#: Sends an event to the client.
Tell = Callable[[dict[str, Any]], None]


class _ClientLeftError(Exception):
    """The client has left."""


class ModelCopy:
    """The copy, loaded at the first request. One thread computes with it, request by request."""

    def __init__(self, served: Served, folder: Path | None, is_offered: bool = True) -> None:
        """folder: of the model; None: unknown. is_offered: whether anything is computed with a copy at all."""
        self._served = served
        self._folder = folder
        self._is_offered = is_offered
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xray")
        self._under_way = 0

    def check_offered(self, model: str | None = None) -> None:
        """Raises ApiError where no copy is made, and for the name of another model than the copied one."""
        if not self._is_offered:
            raise ApiError(
                "this server makes no X-rays: it listens to other machines, and asks for no key", status=403, code="not_allowed"
            )
        if self._folder is None or model not in (None, *self._served.names_of_model):
            raise ApiError("this server knows no folder of its model", status=404, code="not_available")

    async def run(self, request: Request, tokens: int, work: Callable[[Decoder, Check], dict[str, Any]]) -> Response:
        """The response of work on the copy, one at a time. It stops when the client leaves. tokens: that it reads."""
        has_left = threading.Event()

        async def answer() -> Response:
            try:
                # cancelled while it waits, if the client leaves
                return await asyncio.get_running_loop().run_in_executor(
                    self._thread, lambda: JSONResponse(self._on_copy(work, has_left))
                )
            except RequestError as error:
                raise ApiError(str(error), code="invalid_value") from None
            finally:
                has_left.set()

        async with self._admitted(request, tokens):
            return await until_client_leaves(request.receive, answer()) or client_left_response()

    async def events(
        self, request: Request, tokens: int, work: Callable[[Decoder, Check, Tell], None]
    ) -> AsyncGenerator[str, None]:
        """Server-sent events that work on the copy tells, one request at a time. The first item is "", once nothing is refused;
        closing the generator ends the work."""
        loop, has_left = asyncio.get_running_loop(), threading.Event()
        waiting: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        def tell(event: dict[str, Any] | None) -> None:
            loop.call_soon_threadsafe(waiting.put_nowait, event)

        def all_of_it(model: Decoder, check: Check) -> dict[str, Any]:
            work(model, check, tell)
            return {}

        def run() -> None:
            try:
                tell({"what": "copying the model", "progress": 0.0})
                self._on_copy(all_of_it, has_left)
            except _ClientLeftError:
                pass
            except (BessemerError, ApiError) as error:
                tell(as_api_error(error).body())
            except Exception:
                # a bug, which the server's log shows in full
                tell(ApiError("the server failed; its log says why", status=500, kind="server_error").body())
                raise
            finally:
                tell(None)

        async with self._admitted(request, tokens):
            yield ""
            working = loop.run_in_executor(self._thread, run)
            try:
                while (event := await waiting.get()) is not None:
                    yield server_sent_event(event)
            finally:
                has_left.set()
                working.cancel()

    @asynccontextmanager
    async def _admitted(self, request: Request, tokens: int) -> AsyncGenerator[None, None]:
        """Holds a place. Raises ApiError where none is free, or none is given."""
        self.check_offered()
        if self._under_way >= _MOST_AT_ONCE:
            raise overloaded(f"{self._under_way} X-rays are under way; try again in a moment", retry_after=5)
        self._under_way += 1
        try:
            caller_of(request).spend(prompt=tokens)
            with self._served.worker.admit(1):
                yield
        finally:
            self._under_way -= 1

    def check_length(self, tokens: int, longest: int, parameter: str) -> None:
        """Raises ApiError for more tokens than are drawn, or the model reads."""
        longest = min(longest, self._served.engine.context_length)
        if tokens > longest:
            raise ApiError(
                f"the text has {tokens:,} tokens; at most {longest} are drawn", parameter=parameter, code="invalid_value"
            )

    def _on_copy(self, work: Callable[[Decoder, Check], dict[str, Any]], has_left: threading.Event) -> dict[str, Any]:
        """Work's result with the copy of the model. Raises _ClientLeftError once the client has left."""

        def check() -> None:
            if has_left.is_set():
                raise _ClientLeftError

        check()
        model = self._model
        with _stopped(model, check):
            return work(model, check)

    @cached_property
    def _model(self) -> Decoder:
        assert self._folder is not None
        needed, free = 4 * self._served.engine.model.config.parameters(), free_memory_bytes()
        if free is not None and needed > free:
            raise ApiError(
                f"an X-ray takes a copy of the model in float32, {needed / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB are free",
                status=503,
                kind="server_error",
                code="not_available",
            )
        # codes too are made numbers once: else every product would dequantise its weight
        decoder = _decoder_of(self._folder)
        set_dtype(decoder, torch.float32)
        return dequantised(decoder).float().eval()


def _decoder_of(folder: Path) -> Decoder:
    """The decoder of a model; of one that reads pictures too, the part that reads text."""
    tuned = tuned_model(folder)
    path = folder if tuned is None else tuned.folder
    return load_vision_language(path).decoder if is_vision_folder(path) else load_whole(folder)


@contextmanager
def _stopped(model: Decoder, check: Check) -> Generator[None, None, None]:
    """Inside the `with`, every block of the model calls `check` before it computes, where there is no cache."""
    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.callback(block.register_forward_pre_hook(lambda *_: check()).remove)
        yield
