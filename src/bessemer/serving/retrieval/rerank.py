"""`/v1/rerank` in the form of Cohere, Jina and vLLM, and `/v1/score` in vLLM's: how well texts answer a query.

A `TextScorer` scores them. The server has one of its own where it was given one; by the name of a served model, or of the
embedder of its indexes, the scores are cosines of vectors, which is what these models can say.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, Self

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field, model_validator

from bessemer.core.errors import RequestError
from bessemer.retrieval.embed import Embedder
from bessemer.retrieval.search import MOST_CHARACTERS
from bessemer.serving.config import RERANKED
from bessemer.serving.retrieval.stores import VectorStores
from bessemer.serving.runtime.bodies import ApiError, Body, Name, misfit, read_body
from bessemer.serving.runtime.clients import Caller, caller_of
from bessemer.serving.runtime.served import Served, check_encoded


class TextScorer(Protocol):
    """Says how well texts answer a query: rerankers of `retrieval.rerank`, and the cosines of an embedder."""

    def scores(self, query: str, texts: Sequence[str], /) -> Iterable[float]:
        """Of each text, higher for a better one."""


@dataclass(frozen=True)
class CosineReranker:
    """Scores are cosines between the vectors of a query and of texts, from -1 to 1.

    embed: gives vectors of length 1, (N, D), of queries or of documents.
    """

    embed: Callable[[Sequence[str], bool], np.ndarray]

    def scores(self, query: str, texts: Sequence[str], /) -> list[float]:
        vectors_ND = self.embed(texts, False)
        (query_D,) = self.embed([query], True)
        return [float(score) for score in vectors_ND @ query_D]


def cosines_of(embedder: Embedder) -> CosineReranker:
    """The cosines of an embedder."""
    return CosineReranker(lambda texts, are_queries: embedder.embed(texts, "query" if are_queries else "document"))


def _text(document: Any) -> Any:
    """The text of a document as Cohere's clients send it: a text, or an object with one."""
    if isinstance(document, Mapping) and list(document) == ["text"]:
        return document["text"]
    return document


_Document = Annotated[str, BeforeValidator(_text)]
_Documents = Annotated[list[_Document], Field(min_length=1, max_length=RERANKED.most)]
_Query = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]
_Queries = Annotated[list[_Query], Field(min_length=1, max_length=RERANKED.most)]


class RerankRequest(Body):
    """The body of a rerank. return_documents: whether results repeat their texts."""

    model: Name
    query: _Query
    documents: _Documents
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True


class ScoreRequest(Body):
    """The body of a score: one text and several, or as many of both, in pairs. vLLM's names, the older ones too."""

    model: Name
    text_1: _Query | _Queries | None = None
    text_2: str | _Documents | None = None
    queries: _Query | _Queries | None = None
    documents: str | _Documents | None = None

    @model_validator(mode="after")
    def _has_pairs(self) -> Self:
        if (self.text_1 is None) == (self.queries is None) or (self.text_2 is None) == (self.documents is None):
            raise misfit("text_1", "text_1: give text_1 and text_2, or queries and documents")
        firsts, seconds = self._both()
        if len(firsts) not in (1, len(seconds)):
            raise misfit("text_1", f"text_1: {len(firsts)} texts and {len(seconds)} are no pairs; give one, or as many of both")
        return self

    def _both(self) -> tuple[list[str], list[str]]:
        first, second = self.text_1 or self.queries or "", self.text_2 or self.documents or ""
        return [first] if isinstance(first, str) else first, [second] if isinstance(second, str) else second

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each text with what it is compared with."""
        firsts, seconds = self._both()
        return list(zip(firsts * (len(seconds) if len(firsts) == 1 else 1), seconds, strict=True))


class RerankApi:
    """The routes. reranker: the server's own, asked for by its name; None: it has none."""

    def __init__(self, served: Served, stores: VectorStores, reranker: tuple[str, TextScorer] | None = None) -> None:
        self._served = served
        self._stores = stores
        self._own = {} if reranker is None else dict([reranker])

    def router(self) -> APIRouter:
        router = APIRouter()
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            router.add_api_route(path, self.rerank, methods=["POST"])
        for path in ("/score", "/v1/score"):
            router.add_api_route(path, self.score, methods=["POST"])
        return router

    async def rerank(self, request: Request) -> dict[str, Any]:
        body = await read_body(RerankRequest, request)
        caller = caller_of(request)
        scores = await self._scores(body.model, [(body.query, text) for text in body.documents], caller)
        order = sorted(range(len(scores)), key=lambda place: -scores[place])[: body.top_n]
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": body.model,
            "usage": {"prompt_tokens": caller.prompt_tokens, "total_tokens": caller.prompt_tokens},
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
            "results": [
                {"index": place, "relevance_score": scores[place]}
                | ({"document": {"text": body.documents[place]}} if body.return_documents else {})
                for place in order
            ],
        }

    async def score(self, request: Request) -> dict[str, Any]:
        body = await read_body(ScoreRequest, request)
        caller = caller_of(request)
        scores = await self._scores(body.model, body.pairs, caller)
        return {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": [{"index": place, "object": "score", "score": score} for place, score in enumerate(scores)],
            "usage": {"prompt_tokens": caller.prompt_tokens, "total_tokens": caller.prompt_tokens},
        }

    async def _scores(self, model: str, pairs: Sequence[tuple[str, str]], caller: Caller) -> list[float]:
        """The score of each pair. Tokens are counted by the first model's tokenizer. Raises ApiError (404) for a model that
        scores nothing."""
        check_encoded([text for pair in pairs for text in pair])
        if model in self._own or model == await asyncio.to_thread(self._stores.embedder_name):
            caller.model = model
            reranker: TextScorer = self._own[model] if model in self._own else await asyncio.to_thread(self._embedders_cosines)
            return await self._served.run_in_thread(lambda: _scored(reranker, pairs, self._served, caller))
        served = await self._served.model_for(model, caller)
        # no more of the texts are computed at once
        with await served.worker.place(min(len(pairs) + 1, served.engine.max_num_seqs), caller):
            cosines = CosineReranker(lambda texts, _: _vectors(served, model, texts))
            return await asyncio.to_thread(_scored, cosines, pairs, served, caller)

    def _embedders_cosines(self) -> CosineReranker:
        embedder = self._stores.embedder()
        assert embedder is not None, "an embedder with a name is there"
        return cosines_of(embedder)


def _scored(reranker: TextScorer, pairs: Sequence[tuple[str, str]], served: Served, caller: Caller) -> list[float]:
    """The scores of pairs, those of a query together."""
    by_query: dict[str, list[int]] = {}
    for place, (query, _) in enumerate(pairs):
        by_query.setdefault(query, []).append(place)
    tokenizer = served.engine.tokenizer
    caller.spend(prompt=sum(len(tokenizer.encode(text)) for text in [*by_query, *(text for _, text in pairs)]))
    scores = [0.0] * len(pairs)
    for query, places in by_query.items():
        found = reranker.scores(query, [pairs[place][1] for place in places])
        for place, score in zip(places, found, strict=True):
            scores[place] = float(score)
    return scores


def _vectors(served: Served, model: str, texts: Sequence[str]) -> np.ndarray:
    """Vectors by a served language model, as `/v1/embeddings` gives them. Raises ApiError for a text beyond the context."""
    tokenizer, size = served.engine.tokenizer, served.engine.max_num_seqs
    ids = [tokenizer.encode(text or " ") for text in texts]
    for place, each in enumerate(ids):
        served.check_length(f"documents[{place}]", len(each), 0)
    adapter = served.adapter(model)
    try:
        batches = [
            served.engine.embed(ids[start : start + size], adapter=adapter).numpy() for start in range(0, len(ids), size)
        ]
    except RequestError as error:
        raise ApiError(str(error), parameter="documents", code="invalid_value") from None
    return np.concatenate(batches)
