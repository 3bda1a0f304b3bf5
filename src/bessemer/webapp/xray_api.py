"""What the X-ray page asks: a sentence of the user's, seen from inside the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from bessemer.core.environment import free_memory_bytes
from bessemer.core.errors import RequestError
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inspection.heads import without_heads
from bessemer.inspection.inspect import inspect
from bessemer.model.decoder import Decoder
from bessemer.model.storage.tuned_folder import load_whole
from bessemer.serving.runtime.bodies import ApiError, Body, read_body
from bessemer.serving.runtime.clients import caller_of
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.streams import until_client_leaves
from bessemer.webapp.access import without_styles

#: Pictures are drawn of at most these tokens by tokens.
_LONGEST = 512
#: X-rays that are under way or wait; each takes seconds, one after the other.
_MOST_AT_ONCE = 8
_GIB = 2**30


#: Makes an answer of the copy; calls its second argument now and then, which raises where nobody waits any more.
_Work = Callable[[Decoder, Callable[[], None]], dict[str, Any]]


class _ClientLeftError(Exception):
    """Nobody waits for the result."""


class XrayRequest(Body):
    """A sentence, and what of it is opened: the head, the token that looks, and the one that is looked at."""

    text: str = Field(min_length=1, max_length=20_000)
    layer: int | None = Field(None, ge=0)
    head: int | None = Field(None, ge=0)
    query: str = "-1"
    key: str | None = None
    neighbours: list[str] = Field(default_factory=list, max_length=8)
    analogies: list[str] = Field(default_factory=list, max_length=4)
    ablate: bool = True


class WithoutRequest(Body):
    """A sentence that the model goes on with, as it is and without one head."""

    text: str = Field(min_length=1, max_length=20_000)
    layer: int = Field(ge=0)
    head: int = Field(ge=0)
    max_tokens: int = Field(24, ge=1, le=128)


class XrayApi:
    """The routes. They have a copy of the model to themselves, in float32, loaded when they are first asked: what is recorded
    and silenced there is nothing to the requests that the server answers. One thread of their own computes X-rays in turn."""

    def __init__(self, served: Served, folder: Path | None, is_offered: bool = True) -> None:
        """is_offered: False refuses all."""
        self._served = served
        self._folder = folder
        self._is_offered = is_offered
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xray")
        self._under_way = 0

    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter(prefix="/inspect")
        router.add_api_route("/xray", self.xray, methods=["POST"], response_model=None)
        router.add_api_route("/without", self.without, methods=["POST"], response_model=None)
        return router

    async def xray(self, request: Request) -> Response:
        asked = await read_body(XrayRequest, request)
        self._served.check_unguarded()
        return await self._alone(request, asked.text, lambda model, _: self._drawn(asked, model))

    async def without(self, request: Request) -> Response:
        asked = await read_body(WithoutRequest, request)
        self._served.check_unguarded()
        return await self._alone(request, asked.text, lambda model, check: self._answers(asked, model, check))

    async def _alone(self, request: Request, text: str, work: _Work) -> Response:
        """The result of work on the copy, one at a time, off the event loop. It stops when the client leaves."""
        if not self._is_offered:
            raise ApiError(
                "this server makes no X-rays: it listens to other machines, and asks for no key", status=403, code="not_allowed"
            )
        if self._folder is None:
            raise ApiError("this server knows no folder of its model", status=404, code="not_available")
        if self._under_way >= _MOST_AT_ONCE:
            raise ApiError(
                f"{self._under_way} X-rays are under way; try again in a moment",
                status=503,
                kind="server_error",
                code="server_overloaded",
                headers={"Retry-After": "5"},
            )
        has_left = threading.Event()

        def check() -> None:
            if has_left.is_set():
                raise _ClientLeftError

        def run() -> Response:
            model = self._model
            with _stopped(model, check):
                return JSONResponse(work(model, check))

        async def answer() -> Response:
            try:
                # one that waits is never begun once its client has left
                return await asyncio.get_running_loop().run_in_executor(self._thread, run)
            except RequestError as error:
                raise ApiError(str(error), code="invalid_value") from None
            finally:
                has_left.set()

        self._under_way += 1
        try:
            count = len(await asyncio.to_thread(self._served.engine.tokenizer.encode, text))
            if count > min(_LONGEST, self._served.engine.context_length):
                raise ApiError(
                    f"the text has {count:,} tokens; at most {_LONGEST} are drawn", parameter="text", code="invalid_value"
                )
            caller_of(request).spend(prompt=count)
            with self._served.worker.admit(1):
                return await until_client_leaves(request, answer())
        finally:
            self._under_way -= 1

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

    def _drawn(self, asked: XrayRequest, model: Decoder) -> dict[str, Any]:
        # as are the drawings of a run
        from bessemer.views.inspection import inspection_sections, key_figures

        found = inspect(
            model,
            self._served.engine.tokenizer,
            asked.text,
            layer=asked.layer,
            head=asked.head,
            query=asked.query,
            key=asked.key,
            neighbours_of=asked.neighbours,
            analogies=asked.analogies,
            ablate=asked.ablate,
        )
        config = model.config
        return {
            "figures": [{"name": name, "value": value} for name, value in key_figures(found)],
            "sections": [
                {"name": name, "title": title, "html": without_styles(str(body))}
                for name, title, body in inspection_sections(found)
            ],
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "hurts_most": _hurts_most(found.head_changes_LH),
        }

    def _answers(self, asked: WithoutRequest, model: Decoder, check: Callable[[], None]) -> dict[str, Any]:
        params = SamplingParams(max_tokens=asked.max_tokens, temperature=0.0)

        def answer() -> str:
            # an engine of its own each time: keys of a model without the head are no other model's
            engine = Engine(model, self._served.engine.tokenizer)
            text = ""
            for chunk in engine.stream(asked.text, params):
                # a compiled step calls no block
                check()
                text += chunk.text
            return text

        with without_heads(model, [(asked.layer, asked.head)]):
            silenced = answer()
        return {"whole": answer(), "without": silenced}


@contextmanager
def _stopped(model: Decoder, check: Callable[[], None]) -> Generator[None, None, None]:
    """Inside the `with`, every block of the model checks before it computes."""
    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.callback(block.register_forward_pre_hook(lambda *_: check()).remove)
        yield


def _hurts_most(changes_LH: np.ndarray | None) -> dict[str, int] | None:
    """The head without which the loss rises most."""
    if changes_LH is None or not np.isfinite(changes_LH).any():
        return None
    layer, head = np.unravel_index(int(np.nanargmax(changes_LH)), changes_LH.shape)
    return {"layer": int(layer), "head": int(head)}
