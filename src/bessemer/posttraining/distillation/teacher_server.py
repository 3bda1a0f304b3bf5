"""A teacher behind a server: the log-probabilities that it gives the student's tokens.

A prompt of token ids is sent to `/v1/completions` with `echo`, `logprobs` and no new tokens, and comes back with a
log-probability for each token but the first (OpenAI's completions; ours, vLLM and SGLang serve it). Nothing else of the
teacher is needed by the policy gradient of its log-ratios, so that it may lie on another machine, of any size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.core.http_client import ApiError, HttpClient, repeated
from bessemer.posttraining.distillation.config import TeacherServerConfig
from bessemer.tokenization.tokenizer import Tokenizer

#: Seconds before the first retry of a request.
_FIRST_WAIT = 1.0
#: Bytes of an answer: log-probabilities as JSON take some hundred bytes a token.
_MOST_BYTES = 1 << 28
#: Share of tokens that may be called otherwise than by the student's tokenizer: servers show control tokens and parts of
#: characters each in their own way.
_MOST_OTHERWISE = 0.2


class TeacherServer:
    """Scores token ids by a server. Any number of processes may ask it."""

    def __init__(self, config: TeacherServerConfig, tokenizer: Tokenizer) -> None:
        """tokenizer: the student's, whose ids are sent. Raises ConfigError as `HttpClient`."""
        self._config = config
        self._client = HttpClient(config.url, key_variable=config.key_variable, timeout=config.timeout, most_bytes=_MOST_BYTES)
        self._tokenizer = tokenizer
        self._model = config.model
        self._is_checked = False

    def log_probs(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of each text log p of each of its tokens after those before it, in nats, at temperature 1; 0 for the first.

        Raises ConfigError for a teacher of another vocabulary, ApiError, in one line, where a request fails for good.
        """
        if not texts:
            return []
        if self._model is None:
            self._model = self._first_model()
        with ThreadPoolExecutor(self._config.workers) as pool:
            return list(pool.map(self._scored, texts))

    def _first_model(self) -> str:
        listed = self._repeated("/models", None)
        try:
            return str(listed["data"][0]["id"])
        except (LookupError, TypeError):
            raise ApiError(f"{self._client.url}: /models gives no list of models; is it a server of OpenAI's API?") from None

    def _scored(self, ids: Sequence[int]) -> list[float]:
        body = {"model": self._model, "prompt": list(ids), "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 1.0}
        answer = self._repeated("/completions", body)
        try:
            given = answer["choices"][0]["logprobs"]
            tokens, values = given["tokens"][: len(ids)], given["token_logprobs"][: len(ids)]
        except (LookupError, TypeError):
            raise ApiError(
                f"{self._client.url}: gives no log-probabilities of a prompt (echo, logprobs); is it vLLM, SGLang or ours?"
            ) from None
        if len(values) != len(ids):
            raise ApiError(f"{self._client.url}: scores {len(values):,} tokens of {len(ids):,} that were sent")
        self._check_vocabulary(ids, tokens)
        scores = [0.0 if value is None else float(value) for value in values]
        if not all(map(math.isfinite, scores)):
            raise ApiError(f"{self._client.url}: gives log-probabilities that are not finite")
        return scores

    def _check_vocabulary(self, ids: Sequence[int], tokens: Sequence[Any]) -> None:
        """Whether the server calls the ids as the student's tokenizer does, by the first text that comes back."""
        if self._is_checked:
            return
        own = [self._tokenizer.decode([token]) for token in ids]
        plain = [(ours, str(theirs)) for ours, theirs in zip(own, tokens, strict=True) if ours and "\ufffd" not in ours]
        otherwise = sum(ours.strip() not in theirs for ours, theirs in plain)
        if otherwise > _MOST_OTHERWISE * len(plain):
            raise ConfigError(
                f"teacher_server: the teacher has another vocabulary than the student: {otherwise:,} of {len(plain):,} tokens "
                "have other texts; learn from what it writes instead: answers: teacher and loss: cross_entropy"
            )
        self._is_checked = True

    def _repeated(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """The answer to a POST, or to a GET without a body; failures that may pass are tried again."""
        return repeated(
            lambda: self._client.get(path) if body is None else self._client.post(path, body),
            f"teacher_server: {self._client.url}",
            self._config.attempts,
            _FIRST_WAIT,
        )
