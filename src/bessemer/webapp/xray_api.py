"""Routes of the X-ray page: what happens inside the model for a sentence."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from bessemer.core.environment import free_memory_bytes
from bessemer.core.errors import BessemerError, RequestError
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inspection.heads import head_losses, without_heads
from bessemer.inspection.inspect import Inspection, inspect
from bessemer.model.decoder import Decoder
from bessemer.model.storage.tuned_folder import load_whole
from bessemer.serving.runtime.bodies import ApiError, Body, overloaded, read_body
from bessemer.serving.runtime.clients import caller_of
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.streams import (
    EventStream,
    as_api_error,
    client_left_response,
    server_sent_event,
    until_client_leaves,
)
from bessemer.webapp.access import without_styles

#: Most tokens of a sentence: attention is drawn as tokens × tokens.
_LONGEST = 512
#: X-rays that run or wait; they take seconds each, one after the other.
_MOST_AT_ONCE = 8
_GIB = 2**30


#: Computes a result with the copy of the model. Calls its second argument now and then, which raises when the client has left.
_Work = Callable[[Decoder, Callable[[], None]], dict[str, Any]]


class _ClientLeftError(Exception):
    """The client has left."""


class XrayRequest(Body):
    """A sentence, and what is shown in detail: a head, and the tokens of its query and key."""

    text: str = Field(min_length=1, max_length=20_000)
    layer: int | None = Field(None, ge=0)
    head: int | None = Field(None, ge=0)
    query: str = "-1"
    key: str | None = None
    neighbours: list[str] = Field(default_factory=list, max_length=8)
    analogies: list[str] = Field(default_factory=list, max_length=4)
    ablate: bool = True
    stream: bool = False


class WithoutRequest(Body):
    """A sentence to continue with the whole model, and without one head."""

    text: str = Field(min_length=1, max_length=20_000)
    layer: int = Field(ge=0)
    head: int = Field(ge=0)
    max_tokens: int = Field(24, ge=1, le=128)


class XrayApi:
    """The routes. They record and silence heads in a copy of the model, in float32, loaded at the first request, so that other
    requests are not affected. One thread computes X-rays in turn."""

    def __init__(self, served: Served, folder: Path | None, is_offered: bool = True) -> None:
        """is_offered: whether X-rays are made at all."""
        self._served = served
        self._folder = folder
        self._is_offered = is_offered
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xray")
        self._under_way = 0

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/inspect")
        router.add_api_route("/xray", self.xray, methods=["POST"], response_model=None)
        router.add_api_route("/without", self.without, methods=["POST"], response_model=None)
        return router

    async def xray(self, request: Request) -> Response:
        body = await read_body(XrayRequest, request)
        self._served.check_unguarded()
        if not body.stream:
            return await self._run(request, body.text, lambda model, _: self._drawn(body, model))
        events = self._events(request, body)
        # refuses what is wrong before the response begins
        await anext(events)
        return EventStream(events)

    async def without(self, request: Request) -> Response:
        body = await read_body(WithoutRequest, request)
        self._served.check_unguarded()
        return await self._run(request, body.text, lambda model, check: self._answers(body, model, check))

    async def _run(self, request: Request, text: str, work: _Work) -> Response:
        """Run work on the copy, one at a time. It stops when the client leaves."""
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

        async with self._admitted(request, text):
            return await until_client_leaves(request.receive, answer()) or client_left_response()

    async def _events(self, request: Request, body: XrayRequest) -> AsyncGenerator[str, None]:
        """An X-ray in parts: what is being done and how far it is (`progress`, 0 … 1), then all sections but the one of the
        heads' losses, then that one. The first item is "", once nothing is refused; closing the generator ends the work."""
        loop, has_left = asyncio.get_running_loop(), threading.Event()
        waiting: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        def tell(event: dict[str, Any] | None) -> None:
            loop.call_soon_threadsafe(waiting.put_nowait, event)

        def work(model: Decoder, check: Callable[[], None]) -> dict[str, Any]:
            tell({"what": "reading the sentence", "progress": 0.05})
            inspection = self._inspection(body, model, ablate=False)
            tell(_described(inspection))
            if body.ablate and len(inspection.tokens.ids) > 1:

                def on_layer(layer: int, layers: int) -> None:
                    check()
                    tell({"what": f"without each head of layer {layer}", "progress": 0.1 + 0.9 * layer / layers})

                changes_LH = head_losses(model, inspection.tokens.ids, on_layer)[1]
                tell(_described(replace(inspection, head_changes_LH=changes_LH)))
            return {}

        def run() -> None:
            try:
                tell({"what": "copying the model", "progress": 0.0})
                self._on_copy(work, has_left)
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

        async with self._admitted(request, body.text):
            yield ""
            working = loop.run_in_executor(self._thread, run)
            try:
                while (event := await waiting.get()) is not None:
                    yield server_sent_event(event)
            finally:
                has_left.set()
                working.cancel()

    @asynccontextmanager
    async def _admitted(self, request: Request, text: str) -> AsyncGenerator[None, None]:
        """Holds a place for an X-ray of a text. Raises ApiError where none is made."""
        if not self._is_offered:
            raise ApiError(
                "this server makes no X-rays: it listens to other machines, and asks for no key", status=403, code="not_allowed"
            )
        if self._folder is None:
            raise ApiError("this server knows no folder of its model", status=404, code="not_available")
        if self._under_way >= _MOST_AT_ONCE:
            raise overloaded(f"{self._under_way} X-rays are under way; try again in a moment", retry_after=5)
        self._under_way += 1
        try:
            count = len(await asyncio.to_thread(self._served.engine.tokenizer.encode, text))
            if count > min(_LONGEST, self._served.engine.context_length):
                raise ApiError(
                    f"the text has {count:,} tokens; at most {_LONGEST} are drawn", parameter="text", code="invalid_value"
                )
            caller_of(request).spend(prompt=count)
            with self._served.worker.admit(1):
                yield
        finally:
            self._under_way -= 1

    def _on_copy(self, work: _Work, has_left: threading.Event) -> dict[str, Any]:
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
        return load_whole(self._folder).float()

    def _drawn(self, body: XrayRequest, model: Decoder) -> dict[str, Any]:
        return _described(self._inspection(body, model, ablate=body.ablate))

    def _inspection(self, body: XrayRequest, model: Decoder, *, ablate: bool) -> Inspection:
        return inspect(
            model,
            self._served.engine.tokenizer,
            body.text,
            layer=body.layer,
            head=body.head,
            query=body.query,
            key=body.key,
            neighbours_of=body.neighbours,
            analogies=body.analogies,
            ablate=ablate,
        )

    def _answers(self, body: WithoutRequest, model: Decoder, check: Callable[[], None]) -> dict[str, Any]:
        params = SamplingParams(max_tokens=body.max_tokens, temperature=0.0)

        def answer() -> str:
            # a new engine each time: cached keys of the model without the head must not be reused
            engine = Engine(model, self._served.engine.tokenizer)
            text = ""
            for chunk in engine.stream(body.text, params):
                # the blocks' hooks check this too, but a compiled step does not call them
                check()
                text += chunk.text
            return text

        with without_heads(model, [(body.layer, body.head)]):
            silenced = answer()
        return {"whole": answer(), "without": silenced}


@contextmanager
def _stopped(model: Decoder, check: Callable[[], None]) -> Generator[None, None, None]:
    """Inside the `with`, every block of the model calls `check` before it computes."""
    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.callback(block.register_forward_pre_hook(lambda *_: check()).remove)
        yield


def _described(inspection: Inspection) -> dict[str, Any]:
    """An inspection as the page shows it."""
    # heavy to load
    from bessemer.views.inspection import inspection_sections, key_figures

    return {
        "figures": [{"name": name, "value": value} for name, value in key_figures(inspection)],
        "sections": [
            {"name": name, "title": title, "html": without_styles(str(html))}
            for name, title, html in inspection_sections(inspection)
        ],
        "layers": inspection.config.num_hidden_layers,
        "heads": inspection.config.num_attention_heads,
        "hurts_most": _hurts_most(inspection.head_changes_LH),
    }


def _hurts_most(changes_LH: np.ndarray | None) -> dict[str, int] | None:
    """The head whose removal raises the loss most."""
    if changes_LH is None or not np.isfinite(changes_LH).any():
        return None
    layer, head = np.unravel_index(int(np.nanargmax(changes_LH)), changes_LH.shape)
    return {"layer": int(layer), "head": int(head)}
