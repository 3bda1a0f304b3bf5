"""Routes of "change it and see": how a text goes on when a part of the model is silenced, patched or steered, or a word is
another."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from bessemer.inspection.inspect import named_heads, piece_of
from bessemer.inspection.interventions import Changes, Patch, Steering, continuation, state_behind, steering_between
from bessemer.model.decoder import Decoder
from bessemer.serving.runtime.bodies import ApiError, Body, Name, read_body
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.streams import EventStream
from bessemer.webapp.model_copy import LONGEST_PROMPT, Check, ModelCopy, Tell
from bessemer.webapp.token_api import AttentionHead, TokenId, check_without_pictures

#: Likeliest tokens that are told of each place.
_LIKELIEST = 5

LayerNumber = Annotated[int, Field(ge=0)]
Prompts = Annotated[list[Annotated[str, Field(min_length=1, max_length=2_000)]], Field(min_length=1, max_length=16)]


class Edit(Body):
    """Another text in place of some tokens, the `first` to the `last`, counted from 0."""

    first: int = Field(ge=0)
    last: int = Field(ge=0)
    text: str = Field(max_length=2_000)


class PatchFrom(Body):
    """The state behind a layer at the last token comes from the same prompt with an edit."""

    layer: LayerNumber
    edit: Edit


class SteerBetween(Body):
    """A direction from prompts to others, behind a layer, times a strength."""

    layer: LayerNumber
    towards: Prompts
    away: Prompts
    strength: float = Field(1.0, ge=-100, le=100)


class ChangeRequest(Body):
    """A prompt, and what is changed. token: whose probability is told beside. whole: whether the unchanged continuation is told
    too, before the changed one."""

    model: Name | None = None
    before: Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000)]
    token: TokenId | None = None
    heads: list[AttentionHead] = Field(default_factory=list, max_length=256)
    layers: list[LayerNumber] = Field(default_factory=list, max_length=256)
    patch: PatchFrom | None = None
    steer: SteerBetween | None = None
    edit: Edit | None = None
    whole: bool = True
    max_tokens: int = Field(24, ge=1, le=64)

    @model_validator(mode="after")
    def _changes_something(self) -> ChangeRequest:
        if not (self.heads or self.layers or self.patch or self.steer or self.edit):
            raise ValueError("name a change: heads, layers, patch, steer or edit")
        return self


class ChangeApi:
    """The routes. The changes are made to a copy of the model."""

    def __init__(self, served: Served, copy: ModelCopy) -> None:
        self._served = served
        self._copy = copy
        self._names: list[dict[str, Any]] | None = None

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/inspect")
        router.add_api_route("/heads", self.heads, methods=["GET"], response_model=None)
        router.add_api_route("/change", self.change, methods=["POST"], response_model=None)
        return router

    async def heads(self, request: Request) -> Any:
        self._served.check_unguarded()
        config = self._served.engine.model.config

        def measured(model: Decoder, _: Check) -> dict[str, Any]:
            if self._names is None:
                named = named_heads(model, self._served.engine.tokenizer)
                self._names = [
                    {"layer": layer, "head": head, "role": role, "score": round(score, 3)}
                    for (layer, head), (role, score) in named.items()
                ]
            return {"layers": config.num_hidden_layers, "heads": config.num_attention_heads, "names": self._names}

        return await self._copy.run(request, 0, measured)

    async def change(self, request: Request) -> EventStream:
        body = await read_body(ChangeRequest, request)
        self._served.check_unguarded()
        self._copy.check_offered(body.model)
        tokenizer = self._served.engine.tokenizer
        if max(*body.before, body.token or 0) >= tokenizer.vocab_size:
            raise ApiError(f"token ids are below {tokenizer.vocab_size:,}", parameter="before", code="invalid_value")
        check_without_pictures(self._served.engine, body.before)
        for edit in (body.edit, body.patch and body.patch.edit):
            if edit and not edit.first <= edit.last < len(body.before):
                raise ApiError(f"an edit is of tokens 0 … {len(body.before) - 1}", parameter="edit", code="invalid_value")
        edited = await asyncio.to_thread(self._edited, body, body.edit)
        self._copy.check_length(max(len(body.before), len(edited)) + body.max_tokens, LONGEST_PROMPT, "before")
        events = self._copy.events(request, len(edited) + len(body.before), partial(self._both, body, edited))
        # refuses what is wrong before the response begins
        await anext(events)
        return EventStream(events)

    def _edited(self, body: ChangeRequest, edit: Edit | None) -> list[int]:
        if edit is None:
            return list(body.before)
        instead = self._served.engine.tokenizer.encode(edit.text, add_bos=False)
        return [*body.before[: edit.first], *instead, *body.before[edit.last + 1 :]]

    def _both(self, body: ChangeRequest, edited: list[int], model: Decoder, check: Check, tell: Tell) -> None:
        tokenizer = self._served.engine.tokenizer
        patch = steering = None
        tell({"what": "reading", "progress": 0.0})
        if body.patch is not None:
            other = self._edited(body, body.patch.edit)
            self._copy.check_length(len(other), LONGEST_PROMPT, "patch")
            patch = Patch(body.patch.layer, state_behind(model, body.patch.layer, other))
        if body.steer is not None:
            steering = self._steering(body.steer, model, check)
        changes = Changes([(one.layer, one.head) for one in body.heads], body.layers, patch, steering)
        # before anything is told of the unchanged model
        changes.check(model)
        sides: list[tuple[str, list[int], Changes | None]] = [("changed", edited, changes)]
        if body.whole:
            sides.insert(0, ("whole", list(body.before), None))
        for place, (side, tokens, made) in enumerate(sides):
            goes_on = continuation(
                model,
                tokens,
                body.max_tokens,
                made,
                likeliest=_LIKELIEST,
                watched=body.token,
                ends=tokenizer.is_special,
            )
            for number, one in enumerate(goes_on, start=1):
                check()
                likeliest = [{"id": id, "piece": piece_of(tokenizer, id), "probability": share} for id, share in one.likeliest]
                tell(
                    {
                        "side": side,
                        "id": one.id,
                        "piece": piece_of(tokenizer, one.id),
                        "probability": one.probability,
                        "likeliest": likeliest,
                        # of the token that came, in its own place
                        "watched": one.watched if number == 1 else None,
                        "progress": (place + number / body.max_tokens) / len(sides),
                    }
                )

    def _steering(self, steer: SteerBetween, model: Decoder, check: Check) -> Steering:
        tokenizer = self._served.engine.tokenizer
        towards, away = ([tokenizer.encode(text) for text in texts] for texts in (steer.towards, steer.away))
        for ids in (*towards, *away):
            check()
            self._copy.check_length(len(ids), LONGEST_PROMPT, "steer")
        return steering_between(model, steer.layer, towards, away, steer.strength)
