"""Route of the guided forward pass: one token's way, step by step, with a sentence of each step from this token's numbers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import torch
from fastapi import APIRouter, Request
from torch import Tensor

from bessemer.core.errors import BessemerError
from bessemer.inference.capture import Captured
from bessemer.inference.engine import Engine
from bessemer.inspection.forward_pass import LayerParts, layer_parts, layer_shares, logit_without_rounding
from bessemer.inspection.inspect import piece_of
from bessemer.model.attention.base import variant_of
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.serving.runtime.bodies import ApiError, read_body
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.streams import EventStream, as_api_error, server_sent_event
from bessemer.webapp.model_copy import LONGEST_PROMPT, Check, ModelCopy, Tell
from bessemer.webapp.token_api import NextToken, TokenId, captured_states, states_and_logits

# Shapes: L layers and one more for the embedding, V vocabulary, D hidden.

#: Likeliest tokens after a step, alternatives of the token, and places that a head looks at.
_LIKELIEST, _ALTERNATIVES, _PLACES = 5, 20, 5


class ForwardRequest(NextToken):
    """A token that came, with the ones before it."""

    token: TokenId


class ForwardApi:
    """The route. What the engine captures is told first; a copy of the model then splits each layer."""

    def __init__(self, served: Served, copy: ModelCopy) -> None:
        self._served = served
        self._copy = copy

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/inspect")
        router.add_api_route("/forward", self.forward, methods=["POST"], response_model=None)
        return router

    async def forward(self, request: Request) -> EventStream:
        body = await read_body(ForwardRequest, request)
        read = await captured_states(self._served, request, body, all_heads)
        steps = await asyncio.to_thread(_steps, read.served.engine, read.captured, body.token)
        return EventStream(self._events(request, body, read.captured, steps))

    async def _events(
        self, request: Request, body: ForwardRequest, captured: Captured, steps: dict[str, Any]
    ) -> AsyncGenerator[str, None]:
        yield server_sent_event(steps)
        try:
            self._copy.check_offered(body.model)
            if body.images:
                raise ApiError("layers are split by a copy of the model that reads no pictures; here they stay whole")
            self._copy.check_length(len(body.before), LONGEST_PROMPT, "before")
            work = partial(self._split, body, captured)
            async with aclosing(self._copy.events(request, len(body.before), work)) as events:
                async for event in events:
                    if event:
                        yield event
        except ApiError as error:
            # the steps are there; they are only not split
            yield server_sent_event({"note": str(error)})
        except BessemerError as error:
            yield server_sent_event({"note": str(as_api_error(error))})

    def _split(self, body: ForwardRequest, captured: Captured, model: Decoder, check: Check, tell: Tell) -> None:
        tokenizer = self._served.engine.tokenizer

        def on_layer(layer: int, layers: int) -> None:
            check()
            tell({"what": f"reading through layer {layer} again", "progress": 0.5 * layer / layers})

        layers = len(model.blocks)
        for parts in layer_parts(model, body.before, body.token, on_layer):
            check()
            looks = _looks(captured, parts, body.before)
            for look in looks:
                look["piece"] = piece_of(tokenizer, body.before[look["place"]])
            tell(
                {
                    "layer": parts.layer,
                    "attention": parts.attention,
                    "feed_forward": parts.feed_forward,
                    "heads": [round(share, 4) for share in parts.heads_H],
                    "strongest": strongest_head(parts),
                    "looks": looks,
                    "sentence": sentence_of_parts(parts, looks),
                    "progress": 0.5 + 0.5 * (parts.layer + 1) / layers,
                }
            )


def all_heads(config: ModelConfig) -> Sequence[tuple[int, int]]:
    """Every (layer, head) that has attention weights."""
    layers = [layer for layer in range(config.num_hidden_layers) if not variant_of(config, layer).recurrent]
    return [(layer, head) for layer in layers for head in range(config.num_attention_heads)]


def strongest_head(parts: LayerParts) -> int:
    """The head whose share in the logit is the farthest from 0."""
    return max(range(len(parts.heads_H)), key=lambda head: abs(parts.heads_H[head]))


def _looks(captured: Captured, parts: LayerParts, before: Sequence[int]) -> list[dict[str, Any]]:
    """Where the strongest head of a layer looks from the last token: {place, weight}, the largest weights first; none where it
    has no weights."""
    weights = captured.attention.get((parts.layer, strongest_head(parts)))
    if weights is None:
        return []
    best = weights[0, : len(before)].topk(min(_PLACES, len(before)))
    return [
        {"place": place, "weight": weight} for place, weight in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _steps(engine: Engine, captured: Captured, token: int) -> dict[str, Any]:
    """What the captured states say: the embedding, each layer, and the softmax."""
    states_LD, logits_LV = states_and_logits(engine, captured)
    shares_LV = logits_LV.softmax(-1)
    parts = layer_shares(engine.model, states_LD, token)
    piece = piece_of(engine.tokenizer, token)
    steps: list[dict[str, Any]] = []
    for place, (share_V, part) in enumerate(zip(shares_LV, parts, strict=True)):
        likeliest = _likeliest(engine, share_V, _LIKELIEST)
        step = {
            "name": "embedding" if place == 0 else f"layer {place - 1}",
            "part": part,
            "probability": float(share_V[token]),
            "rank": int((share_V > share_V[token]).sum()) + 1,
            "likeliest": likeliest,
        }
        before = steps[-1] if steps else None
        steps.append({**step, "sentence": sentence_of_step(piece, token, step, before)})
    share_V = shares_LV[-1]
    alternatives = _likeliest(engine, share_V, _ALTERNATIVES)
    logit = float(logits_LV[-1, token])
    # the kernels round the inputs of a quantised head; the layers' shares are exact
    rounding = logit - logit_without_rounding(engine.model, states_LD[-1], token)
    return {
        "steps": steps,
        "logit": logit,
        "rounding": rounding,
        "vocabulary": len(share_V),
        "alternatives": alternatives,
        "sentence": sentence_of_softmax(piece, token, logit, float(share_V[token]), len(share_V), alternatives, rounding),
    }


def _likeliest(engine: Engine, share_V: Tensor, count: int) -> list[dict[str, Any]]:
    best = torch.topk(share_V, min(count, len(share_V)))
    return [
        {"id": id, "piece": piece_of(engine.tokenizer, id), "probability": share}
        for id, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


# --- sentences ------------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share as the pages write it."""
    if 0 < share < 0.00005:
        return "less than 0.01 %"
    return f"{100 * share:.{0 if share >= 0.0995 else 1 if share >= 0.00995 else 2}f} %"


def quoted(piece: str) -> str:
    """A token's text in a sentence."""
    return f"“{piece}”" if piece else "the empty token"


def sentence_of_step(piece: str, token: int, step: dict[str, Any], before: dict[str, Any] | None) -> str:
    """One sentence about the embedding or a layer. before: the step before it; None: this is the first."""
    now, best = percent(step["probability"]), step["likeliest"][0]
    leads = best["id"] == token
    if before is None:
        said = f"The last token's embedding alone gives {quoted(piece)} {now}"
        return f"{said}, and it is already the likeliest." if leads else f"{said}; {quoted(best['piece'])} would follow."
    was = percent(before["probability"])
    if was == now:
        moved = f"left {quoted(piece)} at {now}"
        if step["rank"] != before["rank"]:
            moved += f", from place {before['rank']:,} to {step['rank']:,}"
    else:
        moved = f"{'raised' if step['probability'] > before['probability'] else 'lowered'} {quoted(piece)} from {was} to {now}"
    led = before["likeliest"][0]["id"] == token
    if leads and not led:
        end = ", and it now leads"
    elif led and not leads:
        end = f", and {quoted(best['piece'])} now leads with {percent(best['probability'])}"
    elif not leads:
        end = f"; {quoted(best['piece'])} leads with {percent(best['probability'])}"
    else:
        end = ""
    return f"{step['name'].capitalize()} {moved}: it {_added(step['part'])} the logit{end}."


def _added(part: float) -> str:
    return f"added {part:.2f} to" if part >= 0 else f"took {-part:.2f} from"


def sentence_of_parts(parts: LayerParts, looks: Sequence[dict[str, Any]]) -> str:
    """One sentence about a layer's attention and feed-forward."""
    head = strongest_head(parts)
    said = f"Its attention {_added(parts.attention)} the logit, its feed-forward {_added(parts.feed_forward)} it; "
    said += f"of its heads, {head} {_added(parts.heads_H[head])} it"
    if looks:
        said += f" while it looked at {quoted(looks[0]['piece'])} ({percent(looks[0]['weight'])})"
    return f"{said}."


def sentence_of_softmax(
    piece: str,
    token: int,
    logit: float,
    share: float,
    vocabulary: int,
    alternatives: Sequence[dict[str, Any]],
    rounding: float = 0.0,
) -> str:
    """One sentence about the softmax. rounding: part of the logit that comes of rounding in the head's product."""
    said = f"The logit of {quoted(piece)} is {logit:.2f}"
    if abs(rounding) >= 0.005:
        said += f" (rounding {_added(rounding)} it)"
    said += f", which among {vocabulary:,} tokens is {percent(share)}"
    rival = next((one for one in alternatives if one["id"] != token), None)
    if rival is None or not share or not rival["probability"]:
        return f"{said}."
    ratio = share / rival["probability"]
    often = max(ratio, 1 / ratio)
    times = f"{often:,.{1 if often < 100 else 0}f} times {'as likely as' if ratio >= 1 else 'less likely than'}"
    return f"{said}: {times} {quoted(rival['piece'])}."
