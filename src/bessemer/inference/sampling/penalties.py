"""Biases, penalties and bans: changes of single tokens' logits before one is sampled.

In this order, as `transformers` and vLLM have it: bias, repetition, presence and frequency, the user's own processor, and
last what may not be chosen at all, so that nothing brings a banned token back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from bessemer.core.errors import RequestError
from bessemer.inference.sampling.params import SamplingParams

# Shapes: V vocabulary, N some tokens.

#: More biases than the vocabulary's size by this are added as one vector: an element of a vector costs a tenth of one by index.
_DENSE = 10


class TokenCounts:
    """How often each token is in a request's completion, and which ones are in its prompt; updated token by token.

    Arrays that grow, so that a step costs as much as there are different tokens, however long the text.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        prompt_tokens = np.unique(np.asarray(prompt, np.int64))
        #: The different tokens of the prompt, int64 (N,).
        self.in_prompt = prompt_tokens
        self._in_prompt = frozenset(prompt_tokens.tolist())
        self._present = prompt_tokens
        self._present_count = len(prompt_tokens)
        self._places: dict[int, int] = {}
        self._made = np.empty(16, np.int64)
        self._counts = np.empty(16, np.float32)

    def add(self, token: int) -> None:
        """Count a token of the completion."""
        place = self._places.get(token)
        if place is not None:
            self._counts[place] += 1
            return
        place = self._places[token] = len(self._places)
        if place == len(self._made):
            self._made = np.resize(self._made, 2 * place)
            self._counts = np.resize(self._counts, 2 * place)
        self._made[place], self._counts[place] = token, 1
        if token not in self._in_prompt:
            if self._present_count == len(self._present):
                self._present = np.resize(self._present, max(16, 2 * self._present_count))
            self._present[self._present_count] = token
            self._present_count += 1

    @property
    def present(self) -> np.ndarray:
        """The different tokens of prompt and answer, int64 (N,)."""
        return self._present[: self._present_count]

    @property
    def made(self) -> tuple[np.ndarray, np.ndarray]:
        """The different tokens of the answer, int64 (N,), and how often each is there, float32 (N,)."""
        return self._made[: len(self._places)], self._counts[: len(self._places)]


class TokenRules:
    """Biases and bans of single tokens, as arrays. The completions of one prompt share them.

    bias: ids and what is added to their logits. banned, allowed: ids; None: all are allowed. Raises RequestError for a token
    outside the vocabulary.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        check_tokens(params, vocab_size)
        self.bias = (np.array([*params.logit_bias], np.int64), np.array([*params.logit_bias.values()], np.float32))
        self.banned = np.array(params.banned_tokens, np.int64)
        self.allowed = None if params.allowed_tokens is None else np.unique(np.array(params.allowed_tokens, np.int64))
        #: The biases over the whole vocabulary, float32 (V,); None where there are few, which are added by id.
        self._bias_V: np.ndarray | None = None
        if len(params.logit_bias) > vocab_size // _DENSE:
            self._bias_V = np.zeros(vocab_size, np.float32)
            self._bias_V[self.bias[0]] = self.bias[1]
        self._forbidden_V: np.ndarray | None = None
        if self.allowed is not None:
            self._forbidden_V = np.ones(vocab_size, np.bool_)
            self._forbidden_V[self.allowed] = False

    def add_bias(self, logits_V: np.ndarray) -> None:
        """Add the biases in place."""
        if self._bias_V is not None:
            logits_V[: len(self._bias_V)] += self._bias_V
        else:
            ids, values = self.bias
            logits_V[ids] += values

    def forbid(self, logits_V: np.ndarray) -> None:
        """Set the logits of forbidden tokens to -inf."""
        logits_V[self.banned] = -np.inf
        if self._forbidden_V is not None:
            # a table may have more rows than there are tokens
            logits_V[len(self._forbidden_V) :] = -np.inf
            np.copyto(logits_V[: len(self._forbidden_V)], -np.inf, where=self._forbidden_V)


def changes_logits(params: SamplingParams) -> bool:
    """Whether the settings change a token's logits at all, wherever it stands."""
    return (
        params.repetition_penalty != 1
        or bool(params.presence_penalty or params.frequency_penalty)
        or bool(params.logit_bias or params.banned_tokens)
        or params.allowed_tokens is not None
        or params.logits_processor is not None
        or params.watermark is not None
    )


def change_logits(logits_V: np.ndarray, params: SamplingParams, counts: TokenCounts) -> None:
    """Change float32 logits in place by the penalties, between the biases and the user's own processor.

    Repetition (Keskar et al. 2019, made symmetric as in `transformers`): logits of tokens in prompt or answer are divided
    by it where positive, multiplied where negative. Presence and frequency (OpenAI's API reference): logits of tokens in the
    answer lose `presence + frequency · count`.
    """
    if params.repetition_penalty != 1:
        penalty, present = np.float32(params.repetition_penalty), counts.present
        logits_N = logits_V[present]
        logits_V[present] = np.where(logits_N < 0, logits_N * penalty, logits_N / penalty)
    if params.presence_penalty or params.frequency_penalty:
        made, counts_N = counts.made
        logits_V[made] -= np.float32(params.frequency_penalty) * counts_N + np.float32(params.presence_penalty)


def process(processor: Callable[..., Any], prompt: Sequence[int], answer: Sequence[int], logits_V: np.ndarray) -> None:
    """Change logits in place by a user's own processor. Raises RequestError when it fails or gives another shape."""
    given = torch.from_numpy(logits_V.copy())
    try:
        changed = torch.as_tensor(processor(list(prompt), list(answer), given))
    except Exception as error:
        # anything a user's function may raise
        raise RequestError(f"logits_processor failed: {type(error).__name__}: {error}") from error
    if changed.shape != given.shape:
        raise RequestError(
            f"logits_processor gave a tensor of shape {tuple(changed.shape)}; return the logits, of shape {tuple(given.shape)}"
        )
    logits_V[:] = changed.detach().float().numpy()


def check_tokens(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError when the parameters name a token that the model does not have."""
    named: dict[str, Collection[int]] = {
        "logit_bias": params.logit_bias,
        "allowed_tokens": params.allowed_tokens or (),
        "banned_tokens": params.banned_tokens,
        "stop_token_ids": params.stop_token_ids,
    }
    for name, tokens in named.items():
        outside = next((token for token in tokens if token >= vocab_size), None)
        if outside is not None:
            raise RequestError(f"{name}: token id {outside} is outside the vocabulary of {vocab_size:,} tokens")
