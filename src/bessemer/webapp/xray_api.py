"""What the X-ray page asks: a sentence of the user's, seen from inside the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field

from bessemer.core.errors import RequestError
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inspection.ablation import without_heads
from bessemer.inspection.inspect import inspect
from bessemer.model.decoder import Decoder
from bessemer.model.folder import load_model
from bessemer.serving.bodies import ApiError, Body, read_body
from bessemer.serving.clients import caller_of
from bessemer.serving.served import Served
from bessemer.webapp.drawn import without_styles

#: Pictures are drawn of at most these tokens by tokens.
_LONGEST = 512

Result = TypeVar("Result")


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
    and silenced there is nothing to the requests that the server answers."""

    def __init__(self, served: Served, folder: Path | None) -> None:
        self._served = served
        self._folder = folder
        self._lock = threading.Lock()

    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter(prefix="/inspect")
        router.add_api_route("/xray", self.xray, methods=["POST"])
        router.add_api_route("/without", self.without, methods=["POST"])
        return router

    async def xray(self, request: Request) -> dict[str, Any]:
        asked = await read_body(XrayRequest, request)
        self._served.check_unguarded()
        return await self._alone(request, asked.text, lambda model: self._drawn(asked, model))

    async def without(self, request: Request) -> dict[str, Any]:
        asked = await read_body(WithoutRequest, request)
        self._served.check_unguarded()
        return await self._alone(request, asked.text, lambda model: self._answers(asked, model))

    async def _alone(self, request: Request, text: str, work: Callable[[Decoder], Result]) -> Result:
        """The result of work on the copy, one at a time, off the event loop."""
        if self._folder is None:
            raise ApiError("this server knows no folder of its model", status=404, code="not_available")
        count = len(self._served.engine.tokenizer.encode(text))
        if count > min(_LONGEST, self._served.engine.context_length):
            raise ApiError(
                f"the text has {count:,} tokens; at most {_LONGEST} are drawn", parameter="text", code="invalid_value"
            )
        caller_of(request).spend(prompt=count)

        def run() -> Result:
            with self._lock:
                return work(self._model)

        with self._served.worker.admit(1):
            try:
                return await asyncio.to_thread(run)
            except RequestError as error:
                raise ApiError(str(error), code="invalid_value") from None

    @cached_property
    def _model(self) -> Decoder:
        assert self._folder is not None
        return load_model(self._folder).float()

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

    def _answers(self, asked: WithoutRequest, model: Decoder) -> dict[str, Any]:
        params = SamplingParams(max_tokens=asked.max_tokens, temperature=0.0)

        def answer() -> str:
            # an engine of its own each time: keys of a model without the head are no other model's
            return Engine(model, self._served.engine.tokenizer).generate([asked.text], params)[0].text

        with without_heads(model, [(asked.layer, asked.head)]):
            silenced = answer()
        return {"whole": answer(), "without": silenced}


def _hurts_most(changes_LH: np.ndarray | None) -> dict[str, int] | None:
    """The head without which the loss rises most."""
    if changes_LH is None or not np.isfinite(changes_LH).any():
        return None
    layer, head = np.unravel_index(int(np.nanargmax(changes_LH)), changes_LH.shape)
    return {"layer": int(layer), "head": int(head)}
