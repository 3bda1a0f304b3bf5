"""Routes for the pictures of a prompt: where a token looked in them, and the logit lens at one of their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from torch import Tensor

from bessemer.inference.engine import Engine
from bessemer.inspection.inspect import piece_of
from bessemer.inspection.pictures import TilePlace, tile_places
from bessemer.model.config import ModelConfig
from bessemer.serving.runtime.bodies import ApiError, misfit, read_body
from bessemer.serving.runtime.served import Served
from bessemer.webapp.forward_api import all_heads
from bessemer.webapp.token_api import NextToken, ReadToken, captured_states, lens_of, states_and_logits

# Shapes: N heads of all layers, S tokens of the prompt as it is read.

#: Heads that are named as those that look at the pictures most.
_STRONGEST = 5


class PicturesRequest(NextToken):
    """A token with the ones before it and their pictures. layer, head: whose attention; None: the mean of all."""

    images: list[str] = Field(min_length=1)
    layer: int | None = Field(None, ge=0)
    head: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _is_of_a_layer(self) -> PicturesRequest:
        if self.head is not None and self.layer is None:
            raise misfit("head", "a head is of a layer; name that too")
        return self


class PatchRequest(NextToken):
    """A prompt with its pictures. position: of one of its tokens, as it is read."""

    images: list[str] = Field(min_length=1)
    position: int = Field(ge=0)


class PicturesApi:
    """The routes. The engine computes both beside its other requests."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/inspect")
        router.add_api_route("/pictures", self.pictures, methods=["POST"])
        router.add_api_route("/patch", self.patch, methods=["POST"])
        return router

    async def pictures(self, request: Request) -> dict[str, Any]:
        body = await read_body(PicturesRequest, request)
        read = await captured_states(self._served, request, body, all_heads)
        return await asyncio.to_thread(_looked_at, read, body)

    async def patch(self, request: Request) -> dict[str, Any]:
        body = await read_body(PatchRequest, request)
        read = await captured_states(self._served, request, body, lambda config: (), position=body.position)
        return await asyncio.to_thread(_lens, read, body)


def _looked_at(read: ReadToken, body: PicturesRequest) -> dict[str, Any]:
    config: ModelConfig = read.served.engine.model.config
    reader = read.served.engine.pictures
    assert reader is not None, "its pictures were read"
    asked = [pair for pair in all_heads(config) if body.layer in (None, pair[0]) and body.head in (None, pair[1])]
    if not asked:
        message = (
            f"the model has {config.num_hidden_layers} layers of {config.num_attention_heads} heads, and this is none of them"
        )
        raise ApiError(message, parameter="layer", code="invalid_value")
    by_head = {pair: weights[0] for pair, weights in read.captured.attention.items()}
    weights_S = torch.stack([by_head[pair] for pair in asked]).mean(0)
    places_of = [torch.tensor(span.places) for span in read.spans]
    on_pictures = {pair: float(weights[torch.cat(places_of)].sum()) for pair, weights in by_head.items()}
    strongest = sorted(on_pictures, key=lambda pair: -on_pictures[pair])[:_STRONGEST]
    return {
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "before": read.ids,
        "attention": _rounded(weights_S),
        "strongest": [{"layer": layer, "head": head, "share": on_pictures[layer, head]} for layer, head in strongest],
        "pictures": [
            {
                "start": span.start,
                "end": span.end,
                "share": float(weights_S[places].sum()),
                "tiles": [_tile(tile, weights_S) for tile in tile_places(span, reader.config)],
            }
            for span, places in zip(read.spans, places_of, strict=True)
        ],
    }


def _tile(tile: TilePlace, weights_S: Tensor) -> dict[str, Any]:
    weights = weights_S[tile.first : tile.first + tile.token_rows * tile.token_columns]
    return {**tile._asdict(), "share": float(weights.sum()), "weights": _rounded(weights)}


def _rounded(weights: Tensor) -> Sequence[float]:
    return [round(weight, 6) for weight in weights.tolist()]


def _lens(read: ReadToken, body: PatchRequest) -> dict[str, Any]:
    engine: Engine = read.served.engine
    _, logits_LV = states_and_logits(engine, read.captured)
    id = read.ids[body.position]
    return {"id": id, "piece": piece_of(engine.tokenizer, id), "lens": lens_of(engine, logits_LV.softmax(-1), body.token)}
