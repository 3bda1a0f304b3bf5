"""Routes of the X-ray page: what happens inside the model for a sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import Field

from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inspection.heads import head_losses, without_heads
from bessemer.inspection.inspect import Inspection, head_roles_on_random_text, inspect
from bessemer.model.decoder import Decoder
from bessemer.serving.runtime.bodies import Body, read_body
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.streams import EventStream
from bessemer.webapp.access import without_styles
from bessemer.webapp.model_copy import LONGEST, Check, ModelCopy, Tell


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
    """The routes. They record and silence heads in a copy of the model, so that other requests are not affected."""

    def __init__(self, served: Served, copy: ModelCopy) -> None:
        self._served = served
        self._copy = copy

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/inspect")
        router.add_api_route("/xray", self.xray, methods=["POST"], response_model=None)
        router.add_api_route("/without", self.without, methods=["POST"], response_model=None)
        return router

    async def xray(self, request: Request) -> Response:
        body = await read_body(XrayRequest, request)
        count = await self._count(body.text)
        if not body.stream:
            return await self._copy.run(request, count, lambda model, _: self._drawn(body, model))
        events = self._copy.events(request, count, partial(self._in_parts, body))
        # refuses what is wrong before the response begins
        await anext(events)
        return EventStream(events)

    async def without(self, request: Request) -> Response:
        body = await read_body(WithoutRequest, request)
        count = await self._count(body.text)
        return await self._copy.run(request, count, lambda model, check: self._answers(body, model, check))

    async def _count(self, text: str) -> int:
        """The tokens of a text. Raises ApiError where no X-ray is made of it."""
        self._served.check_unguarded()
        self._copy.check_offered()
        count = len(await asyncio.to_thread(self._served.engine.tokenizer.encode, text))
        self._copy.check_length(count, LONGEST, "text")
        return count

    def _in_parts(self, body: XrayRequest, model: Decoder, check: Check, tell: Tell) -> None:
        """What is being done and how far it is (`progress`, 0 … 1), and the sections that there are: first without what heads
        look for and what is lost without each, then without the latter, then all."""
        tell({"what": "reading the sentence", "progress": 0.05})
        inspection = self._inspection(body, model, is_whole=False)
        tell(_described(inspection))
        tell({"what": "what heads look for", "progress": 0.1})
        roles = head_roles_on_random_text(model, self._served.engine.tokenizer, inspection.tokens)
        inspection = replace(inspection, roles=roles)
        tell(_described(inspection))
        if body.ablate and len(inspection.tokens.ids) > 1:

            def on_layer(layer: int, layers: int) -> None:
                check()
                tell({"what": f"without each head of layer {layer}", "progress": 0.2 + 0.8 * layer / layers})

            changes_LH = head_losses(model, inspection.tokens.ids, on_layer)[1]
            tell(_described(replace(inspection, head_changes_LH=changes_LH)))

    def _drawn(self, body: XrayRequest, model: Decoder) -> dict[str, Any]:
        return _described(self._inspection(body, model))

    def _inspection(self, body: XrayRequest, model: Decoder, *, is_whole: bool = True) -> Inspection:
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
            ablate=body.ablate and is_whole,
            roles=is_whole,
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
