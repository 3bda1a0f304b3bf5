"""What the page asks about one token: what else could have come, and what the model made of it layer by layer."""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Request
from pydantic import Field
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.capture import Capture, Captured
from bessemer.inference.sampling.distribution import truncated_logits
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inspection.inspect import piece_of
from bessemer.inspection.recording import lens_logits
from bessemer.serving.runtime.bodies import ApiError, Body, Name, read_body
from bessemer.serving.runtime.clients import caller_of
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.streams import as_api_error
from bessemer.serving.runtime.worker import TextEngine

# Shapes: L layers and one more for the embeddings, V vocabulary.

#: Alternatives of the token, and likeliest tokens of a layer.
_ALTERNATIVES, _LIKELIEST = 20, 3

TokenId = Annotated[int, Field(ge=0)]


class PiecesRequest(Body):
    """Tokens whose texts are asked for, each by itself."""

    ids: Annotated[list[TokenId], Field(max_length=1_000_000)]
    model: Name | None = None


class HeadOf(Body):
    """A head whose attention is asked for."""

    layer: int = Field(ge=0)
    head: int = Field(ge=0)


class TokenRequest(Body):
    """A token with the ones before it, and how it is sampled.

    before: the prompt, and the answer up to the token. token: the one that came; None: only what could come.
    """

    model: Name
    before: Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000)]
    token: TokenId | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    attention: HeadOf | None = None


class TokenApi:
    """The routes. The engine computes a token's states beside the requests that run: of its prompt, the cache is used."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter(prefix="/inspect")
        router.add_api_route("/pieces", self.pieces, methods=["POST"])
        router.add_api_route("/token", self.token, methods=["POST"])
        return router

    async def pieces(self, request: Request) -> dict[str, Any]:
        asked = await read_body(PiecesRequest, request)
        served = await self._served.of(asked.model or self._served.model_name, caller_of(request))
        tokenizer = served.engine.tokenizer
        return {"pieces": await asyncio.to_thread(lambda: [piece_of(tokenizer, id) for id in asked.ids])}

    async def token(self, request: Request) -> dict[str, Any]:
        asked = await read_body(TokenRequest, request)
        caller = caller_of(request)
        self._served.check_unguarded()
        served = await self._served.of(asked.model, caller)
        served.check_length("before", len(asked.before), 1)
        vocab_size = served.engine.tokenizer.vocab_size
        if any(id >= vocab_size for id in (*asked.before, asked.token or 0)):
            raise ApiError(f"token ids are below {vocab_size:,}", parameter="before", code="invalid_value")
        engine, config = served.engine, served.engine.model.config
        sparse = tuple(layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer))
        head = asked.attention
        capture = Capture(
            states=tuple(range(config.num_hidden_layers + 1)),
            attention=() if head is None else ((head.layer, head.head),),
            routing=sparse,
            positions=(len(asked.before) - 1,),
        )
        params = SamplingParams(max_tokens=1, temperature=0.0)
        with served.worker.admit(1):
            try:
                made = await asyncio.to_thread(
                    engine.prepare,
                    asked.before,
                    params,
                    adapter=served.adapter(asked.model),
                    cache_salt=caller.salt(None),
                    capture=capture,
                )
            except RequestError as error:
                raise as_api_error(error) from None
            (completion,) = await served.worker.complete([made], params, caller)
        assert completion.captured is not None, "a capture was asked for"
        return await asyncio.to_thread(_described, served.engine, asked, completion.captured)


def _described(engine: TextEngine, asked: TokenRequest, captured: Captured) -> dict[str, Any]:
    model = engine.model
    states_LD = torch.cat([captured.states[layer] for layer in sorted(captured.states)])
    logits_LV = lens_logits(model, states_LD.numpy()).float()
    # a table may have more rows than there are tokens
    logits_LV = logits_LV[:, : engine.tokenizer.vocab_size].cpu()
    shares_LV = logits_LV.softmax(-1)
    share_V, sampled_V = shares_LV[-1], _sampled(logits_LV[-1], asked)
    shown = share_V.topk(min(_ALTERNATIVES, len(share_V))).indices.tolist()
    config = model.config
    described: dict[str, Any] = {
        "entropy_bits": float(torch.special.entr(share_V.double()).sum()) / math.log(2),
        "kept": int((sampled_V > 0).sum()),
        "vocabulary": len(share_V),
        "alternatives": [_alternative(engine, id, share_V, sampled_V) for id in shown],
        "token": None,
        "lens": _lens(engine, shares_LV, asked.token),
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
    if asked.token is not None:
        rank = int((share_V > share_V[asked.token]).sum()) + 1
        described["token"] = {**_alternative(engine, asked.token, share_V, sampled_V), "rank": rank}
    if asked.attention is not None:
        weights = captured.attention[asked.attention.layer, asked.attention.head][0]
        described["attention"] = [round(weight, 5) for weight in weights.tolist()]
    return described


def _alternative(engine: TextEngine, id: int, share_V: Tensor, sampled_V: Tensor) -> dict[str, Any]:
    piece = piece_of(engine.tokenizer, id)
    return {"id": id, "piece": piece, "probability": float(share_V[id]), "sampled": float(sampled_V[id])}


def _lens(engine: TextEngine, shares_LV: Tensor, token: int | None) -> list[dict[str, Any]]:
    """What would come if the model ended after each layer."""
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


def _sampled(logits_V: Tensor, asked: TokenRequest) -> Tensor:
    """The distribution that a token is drawn from, (V,)."""
    if asked.temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), len(logits_V)).float()
    params = SamplingParams(
        temperature=asked.temperature, top_p=asked.top_p, top_k=asked.top_k, min_p=asked.min_p, max_tokens=1
    )
    return truncated_logits(logits_V[None], params).softmax(-1)[0]
