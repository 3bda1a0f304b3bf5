"""Routes for one token: its alternatives, and the logit lens, attention and experts behind it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any, NamedTuple

import torch
from fastapi import APIRouter, Request
from pydantic import Field, field_validator
from torch import Tensor

from bessemer.core.errors import BessemerError, RequestError
from bessemer.inference.capture import Capture, Captured
from bessemer.inference.engine import Engine
from bessemer.inference.images import PicturePrompt
from bessemer.inference.sampling.distribution import truncated_logits
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inspection.inspect import piece_of
from bessemer.model.config import ModelConfig
from bessemer.model.vision.prompts import ImageSpan
from bessemer.serving.config import IMAGES
from bessemer.serving.runtime.bodies import ApiError, Body, Name, misfit, read_body
from bessemer.serving.runtime.clients import caller_of
from bessemer.serving.runtime.pictures import image_of_uri, prepared_pictures
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.streams import as_api_error

# Shapes: L layers and one more for the embeddings, V vocabulary.

#: Alternatives of the token, and likeliest tokens of a layer.
_ALTERNATIVES, _LIKELIEST = 20, 3

TokenId = Annotated[int, Field(ge=0)]


class PiecesRequest(Body):
    """Token ids, to be shown one by one."""

    ids: Annotated[list[TokenId], Field(max_length=1_000_000)]
    model: Name | None = None


class AttentionHead(Body):
    """An attention head."""

    layer: int = Field(ge=0)
    head: int = Field(ge=0)


class NextToken(Body):
    """A token with the ones before it.

    before: the prompt, and the answer up to the token. token: the one that came; None: only what could come. images: the
    pictures of the prompt, each a `data:` URI with one image token in `before`, as `prompt_token_ids` of a chat has them.
    """

    model: Name
    before: Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000)]
    token: TokenId | None = None
    images: Annotated[list[str], Field(max_length=IMAGES.most)] = Field(default_factory=list, repr=False)

    @field_validator("images")
    @classmethod
    def _are_pictures(cls, images: list[str]) -> list[str]:
        for image in images:
            try:
                image_of_uri(image)
            except ValueError as error:
                raise misfit("images", str(error)) from None
        return images


class TokenRequest(NextToken):
    """The same, and how the token is sampled."""

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    attention: AttentionHead | None = None


class TokenApi:
    """The routes. The engine computes the states of a token with its other requests, and uses the prefix cache."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/inspect")
        router.add_api_route("/pieces", self.pieces, methods=["POST"])
        router.add_api_route("/token", self.token, methods=["POST"])
        router.add_api_route("/opening/{name:path}", self.opening, methods=["GET"])
        return router

    async def opening(self, name: str) -> dict[str, Any]:
        """Whether a model is open, loading (`seconds`, `bytes`), or closed."""
        self._served.check_model(name)
        pool = self._served.pool
        if pool is None or not self._served.is_additional(name) or name in (model.name for model in pool.open_models):
            return {"state": "open", "seconds": None, "bytes": None}
        seconds = pool.loading_seconds(name)
        with suppress(OSError, BessemerError):
            size = await asyncio.to_thread(pool.size, name)
            return {"state": "closed" if seconds is None else "loading", "seconds": seconds, "bytes": size}
        return {"state": "closed" if seconds is None else "loading", "seconds": seconds, "bytes": None}

    async def pieces(self, request: Request) -> dict[str, Any]:
        body = await read_body(PiecesRequest, request)
        served = await self._served.model_for(body.model or self._served.model_name, caller_of(request))
        tokenizer = served.engine.tokenizer
        return {"pieces": await asyncio.to_thread(lambda: [piece_of(tokenizer, id) for id in body.ids])}

    async def token(self, request: Request) -> dict[str, Any]:
        body = await read_body(TokenRequest, request)
        attention = () if body.attention is None else ((body.attention.layer, body.attention.head),)
        read = await captured_states(self._served, request, body, lambda config: attention)
        described = await asyncio.to_thread(_described, read.served.engine, body, read.captured)
        if not read.spans:
            return described
        # with pictures there are more tokens than were sent
        reader = read.served.engine.pictures
        return described | {"before": read.ids, "image_token_id": reader and reader.image_token_id}


class ReadToken(NamedTuple):
    """A model, and what it was captured at one token of. ids: the prompt as it was read, where each picture has as many tokens
    as it has vectors; spans: the pictures in it."""

    served: Served
    captured: Captured
    ids: list[int]
    spans: tuple[ImageSpan, ...]


async def captured_states(
    root: Served,
    request: Request,
    body: NextToken,
    attention: Callable[[ModelConfig], Sequence[tuple[int, int]]],
    position: int | None = None,
) -> ReadToken:
    """A model's states at the last token before one, computed beside the requests that run.

    attention: (layer, head) of which weights are captured too. position: of another token instead. Raises ApiError for what is
    wrong with the request.
    """
    caller = caller_of(request)
    root.check_unguarded()
    served = await root.model_for(body.model, caller)
    served.check_length("before", len(body.before), 1)
    vocab_size = served.engine.tokenizer.vocab_size
    if any(id >= vocab_size for id in (*body.before, body.token or 0)):
        raise ApiError(f"token ids are below {vocab_size:,}", parameter="before", code="invalid_value")
    engine, config = served.engine, served.engine.model.config
    prompt, ids, spans = await asyncio.to_thread(_with_pictures, engine, body)
    if position is not None and position >= len(ids):
        raise ApiError(
            f"the prompt has {len(ids):,} tokens, and none at {position}", parameter="position", code="invalid_value"
        )
    capture = Capture(
        states=tuple(range(config.num_hidden_layers + 1)),
        attention=tuple(attention(config)),
        routing=tuple(layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer)),
        positions="last" if position is None else (position,),
    )
    params = SamplingParams(max_tokens=1, temperature=0.0)
    with served.worker.admit(1):
        try:
            made = await asyncio.to_thread(
                engine.prepare,
                prompt,
                params,
                adapter=served.adapter(body.model),
                cache_salt=caller.salt(None),
                capture=capture,
            )
        except RequestError as error:
            raise as_api_error(error) from None
        (completion,) = await served.worker.complete([made], params, caller)
    assert completion.captured is not None, "the request has a capture"
    return ReadToken(served, completion.captured, ids, spans)


def _with_pictures(engine: Engine, body: NextToken) -> tuple[list[int] | PicturePrompt, list[int], tuple[ImageSpan, ...]]:
    """The prompt, its tokens as they are read, and the pictures in it. Raises ApiError."""
    if not body.images:
        check_without_pictures(engine, body.before)
        return body.before, body.before, ()
    content = [{"type": "image", "image": image_of_uri(image)} for image in body.images]
    try:
        pictures = prepared_pictures([{"content": content}], engine)
        assert engine.pictures is not None, "`prepared_pictures` refuses them"
        ids, spans = engine.pictures.expand(body.before, pictures)
    except RequestError as error:
        raise ApiError(str(error), parameter="images", code="invalid_value") from None
    return PicturePrompt(body.before, pictures), ids, spans


def check_without_pictures(engine: Engine, ids: Sequence[int]) -> None:
    """Raises ApiError for tokens that stand for pictures: without these they would be read as words."""
    if engine.pictures is not None and engine.pictures.image_token_id in ids:
        raise ApiError("the prompt has pictures, which are not read here", parameter="before", code="invalid_value")


def _described(engine: Engine, body: TokenRequest, captured: Captured) -> dict[str, Any]:
    _, logits_LV = states_and_logits(engine, captured)
    shares_LV = logits_LV.softmax(-1)
    share_V, sampled_V = shares_LV[-1], _sampled(logits_LV[-1], body)
    shown = share_V.topk(min(_ALTERNATIVES, len(share_V))).indices.tolist()
    config = engine.model.config
    described: dict[str, Any] = {
        "entropy_bits": float(torch.special.entr(share_V.double()).sum()) / math.log(2),
        "kept": int((sampled_V > 0).sum()),
        "vocabulary": len(share_V),
        "alternatives": [_alternative(engine, id, share_V, sampled_V) for id in shown],
        "token": None,
        "lens": lens_of(engine, shares_LV, body.token),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "attention": None,
        "experts": [
            {
                "layer": layer,
                "experts": captured.experts[layer][0].tolist(),
                "weights": captured.expert_weights[layer][0].tolist(),
            }
            for layer in sorted(captured.experts)
        ],
    }
    if body.token is not None:
        rank = int((share_V > share_V[body.token]).sum()) + 1
        described["token"] = {**_alternative(engine, body.token, share_V, sampled_V), "rank": rank}
    if body.attention is not None:
        weights = captured.attention[body.attention.layer, body.attention.head][0]
        described["attention"] = [round(weight, 5) for weight in weights.tolist()]
    return described


def states_and_logits(engine: Engine, captured: Captured) -> tuple[Tensor, Tensor]:
    """The states at the captured token, (L, D), and what the last norm and the head make of each, (L, V)."""
    states_LD = torch.cat([captured.states[layer] for layer in sorted(captured.states)])
    logits_LV = engine.lens_logits(states_LD)
    # the embedding may have more rows than the vocabulary has tokens
    return states_LD, logits_LV[:, : engine.tokenizer.vocab_size].cpu()


def _alternative(engine: Engine, id: int, share_V: Tensor, sampled_V: Tensor) -> dict[str, Any]:
    piece = piece_of(engine.tokenizer, id)
    return {"id": id, "piece": piece, "probability": float(share_V[id]), "sampled": float(sampled_V[id])}


def lens_of(engine: Engine, shares_LV: Tensor, token: int | None) -> list[dict[str, Any]]:
    """The logit lens: the likeliest tokens after each layer."""
    tokenizer = engine.tokenizer
    lens = []
    for layer, share_V in enumerate(shares_LV):
        best = share_V.topk(_LIKELIEST)
        likeliest = [
            {"piece": piece_of(tokenizer, id), "probability": probability}
            for id, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        row: dict[str, Any] = {"after": "embedding" if layer == 0 else f"layer {layer - 1}", "likeliest": likeliest}
        if token is not None:
            row |= {"probability": float(share_V[token]), "rank": int((share_V > share_V[token]).sum()) + 1}
        lens.append(row)
    return lens


def _sampled(logits_V: Tensor, body: TokenRequest) -> Tensor:
    """The distribution that a token is sampled from, (V,)."""
    if body.temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), len(logits_V)).float()
    params = SamplingParams(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, min_p=body.min_p, max_tokens=1)
    return truncated_logits(logits_V[None], params).softmax(-1)[0]
