"""Rerankers: each passage of a pool is read together with the query, and scored.

Two vectors are made without knowledge of each other; a reranker sees both texts, and costs a model's pass for each passage. So
it orders the few passages that a search found.

- `CrossEncoder`: an encoder with a classifier over the pair (Nogueira and Cho 2019), from a folder as `sentence-transformers`
  and `transformers` write it.
- `LikelihoodReranker`: how likely a language model finds the query as a question on the passage (Sachan et al. 2022). It needs
  no training for it.
- `ServerReranker`: `/rerank` of a server, in the form of Cohere, Jina and vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bessemer.core.errors import ArtefactError, ConfigError, RequestError
from bessemer.core.http_client import ApiError, HttpClient, repeated
from bessemer.inference.engine import Engine
from bessemer.retrieval.encoder_texts import EncoderTexts, holds_encoder, read_values

# Shapes: N passages.

#: Tokens of a passage that a language model reads.
PASSAGE_TOKENS = 160
_TASK = "Write a question that the passage answers."
#: Attempts of a request, and seconds before the second.
_ATTEMPTS, _FIRST_WAIT = 5, 1.0
#: Environment variable with the key of a server, if one is needed.
_KEY = "RERANK_API_KEY"


class Reranker(Protocol):
    """Says how well passages answer a query."""

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """Of each passage, (N,) float32, higher for a better one. Scores of two rerankers do not compare."""


def open_reranker(name: str) -> Reranker:
    """The reranker that a user names: the folder of a cross-encoder, the folder or GGUF file of a language model, or URL#MODEL.
    Raises ArtefactError for a model that cannot be read, ConfigError for any other name."""
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        if not model:
            raise ConfigError(f"--rerank {name}: say which model behind the URL: {name}#MODEL")
        return ServerReranker(url, model)
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"--rerank {name}: no such folder or file")
    return CrossEncoder(path) if path.is_dir() and holds_encoder(path) else LikelihoodReranker(Engine(path))


class CrossEncoder:
    """An encoder that reads query and passage as one text, with a single score.

    Scores are what the folder's files say: the classifier's output, or its sigmoid, the default of `sentence-transformers`.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises ArtefactError for a folder without an encoder, a tokenizer or a classifier of one score, and for an unknown
        activation."""
        self._texts = EncoderTexts(folder, device)
        labels = self._texts.encoder.config.num_labels
        if labels != 1:
            has = f"its classifier has {labels}" if labels else "it has no classifier"
            raise ArtefactError(f"{folder}: a reranker gives a pair one score, and {has}")
        activation = _activation(read_values(folder / "config.json"))
        if activation not in ("Sigmoid", "Identity"):
            raise ArtefactError(f"{folder / 'config.json'}: the activation {activation!r} of the score is not known")
        self._is_probability = activation == "Sigmoid"

    @torch.inference_mode()
    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        scores_N = np.empty(len(passages), np.float32)
        for batch in self._texts.batches([(query, passage) for passage in passages]):
            logits_B = self._texts.encoder.scores(batch.ids_BT, batch.mask_BT, batch.types_BT)[:, 0]
            scores_N[batch.places_B] = (logits_B.sigmoid() if self._is_probability else logits_B).cpu().numpy()
        return scores_N


def _activation(values: Mapping[str, Any]) -> str:
    """The name of the function over the classifier's output, as versions of `sentence-transformers` write it."""
    named = (values.get("sentence_transformers") or {}).get("activation_fn")
    return str(named or values.get("sbert_ce_default_activation_function") or "Sigmoid").rpartition(".")[2]


class LikelihoodReranker:
    """The mean log-probability of the query's tokens, in nats, as a question that a language model asks about the passage."""

    def __init__(self, engine: Engine, passage_tokens: int = PASSAGE_TOKENS) -> None:
        """passage_tokens: of a passage, so many are read."""
        self._engine = engine
        self._passage_tokens = passage_tokens

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """As `Reranker.scores`. Raises RequestError for a query that fills the context."""
        tokenizer = self._engine.tokenizer
        query_ids = self._question(query)
        room = self._engine.longest - len(query_ids) - len(self._prompt("")) - 1
        if room < 1:
            raise RequestError(
                f"the query has {len(query_ids):,} tokens, which leave a passage no room in a context of "
                f"{self._engine.longest:,}: shorten it"
            )
        items = []
        for passage in passages:
            ids = tokenizer.encode(passage, add_bos=False)[: min(self._passage_tokens, room)]
            items.append((self._prompt(tokenizer.decode(ids)), [query_ids]))
        scored = self._engine.score_items(items)
        return np.array([score.total / len(query_ids) for (score,) in scored], np.float32)

    def _prompt(self, passage: str) -> list[int]:
        """What stands before the question. It begins alike for all passages, so the engine reads its beginning once."""
        tokenizer = self._engine.tokenizer
        if tokenizer.chat_template is None:
            return tokenizer.encode(f"{_TASK}\n\n{passage}\n\nQuestion:")
        messages = [{"role": "system", "content": _TASK}, {"role": "user", "content": passage}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def _question(self, query: str) -> list[int]:
        tokenizer = self._engine.tokenizer
        return tokenizer.encode(query if tokenizer.chat_template else f" {query}", add_bos=False)


class ServerReranker:
    """`/rerank` of a URL, such as https://api.jina.ai/v1. The key, if one is needed, is in the environment variable
    RERANK_API_KEY."""

    def __init__(self, url: str, model: str) -> None:
        self._client = HttpClient(url, key_variable=_KEY if os.environ.get(_KEY) else "")
        self._model = model

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """As `Reranker.scores`. Raises ApiError."""
        if not passages:
            return np.empty(0, np.float32)
        body = {"model": self._model, "query": query, "documents": list(passages), "top_n": len(passages)}
        answer = repeated(partial(self._client.post, "/rerank", body), self._client.url, _ATTEMPTS, _FIRST_WAIT)
        scores_N = np.full(len(passages), np.nan, np.float32)
        try:
            for one in answer["results"]:
                scores_N[int(one["index"])] = float(one["relevance_score"])
        except (TypeError, KeyError, ValueError, IndexError):
            raise ApiError(f"{self._client.url}: the answer holds no scores of passages") from None
        if np.isnan(scores_N).any():
            raise ApiError(f"{self._client.url}: {int(np.isnan(scores_N).sum())} of {len(passages)} passages have no score")
        return scores_N
