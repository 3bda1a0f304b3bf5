"""Rerankers: each passage of a pool is read together with the query, and scored.

Two vectors are made without knowledge of each other; a reranker sees both texts, and costs a model's pass for each passage. So
it orders the few passages that a search found.

- `CrossEncoder`: an encoder with a classifier over the pair (Nogueira and Cho 2019), from a folder as `sentence-transformers`
  and `transformers` write it.
- `HeadingReranker`: how likely a language model names the passage's heading in answer to the query. It needs no training for
  it, knows names that the passage's own words do not explain, and reads the query once for all passages.
- `ServerReranker`: `/rerank` of a server, in the form of Cohere, Jina and vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch

from bessemer.core.errors import ArtefactError, ConfigError, RequestError
from bessemer.core.http_client import ApiError, HttpClient, repeated
from bessemer.inference.engine import Engine
from bessemer.retrieval.encoder_texts import EncoderTexts, holds_encoder, read_values

# Shapes: N passages.

_TASK = "Name the part of the documentation that answers the question."
#: Questions with the headings that answer them, which show the form.
_EXAMPLES = (
    ("How do I write a text in capitals?", "str.upper"),
    ("Who may work from home?", "Handbook › Working hours › Home office"),
    ("How do I get the current folder?", "os.getcwd"),
)
#: Most tokens of a heading that are scored.
_HEADING_TOKENS = 24
#: Attempts of a request, and seconds before the second.
_ATTEMPTS, _FIRST_WAIT = 5, 1.0
#: Environment variable with the key of a server, if one is needed.
_KEY = "RERANK_API_KEY"


class Reranker(Protocol):
    """Says how well passages answer a query."""

    @property
    def weight(self) -> float | None:
        """What a unit of its score adds to the score of the fused searches; None: its scores alone order the passages."""

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
    return CrossEncoder(path) if path.is_dir() and holds_encoder(path) else HeadingReranker(Engine(path))


class CrossEncoder:
    """An encoder that reads query and passage as one text, with a single score.

    Scores are what the folder's files say: the classifier's output, or its sigmoid, the default of `sentence-transformers`.
    """

    weight: float | None = None

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


class HeadingReranker:
    """The log-probability, in nats, of a passage's heading as a language model's answer to the query: log p(heading | query).

    By Bayes' rule that holds how likely the query is for the heading, and how well known the heading is. A heading is the first
    line of a passage as it is shown, without the parameters of a function.
    """

    #: Chosen on `benchmarks/retrieval_development.json` with SmolLM2-135M-Instruct.
    weight: float | None = 0.03

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # a server searches in several threads, and an engine computes in one at a time
        self._lock = Lock()

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """As `Reranker.scores`. Raises RequestError for a query that fills the context."""
        if not passages:
            return np.empty(0, np.float32)
        headings = [self._heading(passage) for passage in passages]
        prompt = self._prompt(query)
        if len(prompt) + max(map(len, headings)) > self._engine.longest:
            raise RequestError(
                f"the query takes {len(prompt):,} tokens with its instructions, and the reranker's context is "
                f"{self._engine.longest:,}: shorten it"
            )
        with self._lock:
            return np.array([score.total for score in self._engine.score(prompt, headings)], np.float32)

    def _heading(self, passage: str) -> list[int]:
        line = passage.strip().partition("\n")[0].partition("(")[0].strip()
        # the end of a line belongs to it: a heading that another begins with is not likelier for it
        return [
            *self._engine.tokenizer.encode(line or passage.strip()[:80] or "-", add_bos=False)[:_HEADING_TOKENS],
            *self._engine.tokenizer.encode("\n", add_bos=False),
        ]

    def _prompt(self, query: str) -> list[int]:
        tokenizer = self._engine.tokenizer
        if tokenizer.chat_template is None:
            shown = "".join(f"Question: {question}\nAnswer: {heading}\n\n" for question, heading in _EXAMPLES)
            return tokenizer.encode(f"{_TASK}\n\n{shown}Question: {query}\nAnswer: ")
        messages = [{"role": "system", "content": _TASK}]
        for question, heading in (*_EXAMPLES, (query, "")):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": heading}]
        return tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)


class ServerReranker:
    """`/rerank` of a URL, such as https://api.jina.ai/v1. The key, if one is needed, is in the environment variable
    RERANK_API_KEY."""

    weight: float | None = None

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
