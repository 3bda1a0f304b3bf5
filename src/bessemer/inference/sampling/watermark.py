"""Watermarks: sampling leaves a mark in a text that is found with the key alone, without the model.

A keyed function gives each token of the vocabulary a number r, uniform in (0, 1), after each context: the last few tokens of
the answer. Two ways of choosing by it:

- `gumbel` (Aaronson 2022): the token with the largest r^(1/p) of the truncated probabilities p. Over keys its distribution is
  p, so that a text on average loses nothing. A text's score is the sum of -ln(1 - r) over its T tokens, which without the mark
  is Gamma(T, 1).
- `green` (Kirchenbauer et al. 2023): the logits of tokens with r below γ, the green ones, rise by δ. Without the mark a text's
  green tokens are Binomial(T, γ).

A context that the answer had before is not marked again, since repeated numbers would distort the text and count twice
(Hu et al. 2023; Fernandez et al. 2023); and the first tokens, whose context the prompt begins, are not marked at all, so that
an answer is tested without its prompt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bessemer.inference.sampling.params import WatermarkConfig

# Shapes: N some tokens, T scored tokens.

#: The increment and the two factors of SplitMix64 (Steele et al. 2014).
_STEP, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Detection(NamedTuple):
    """What a text says about a key. tokens: those that were scored. score: by token, in standard deviations above its mean
    without a mark. p_value: the probability of at least this much without a mark; it is uniform on such texts."""

    tokens: int
    score: float
    p_value: float


class Watermark:
    """The watermark of one completion, which knows the contexts that were marked."""

    def __init__(self, config: WatermarkConfig) -> None:
        self.config = config
        self.is_gumbel = config.method == "gumbel"
        self._seen: set[tuple[int, ...]] = set()

    def context(self, answer: Sequence[int]) -> tuple[int, ...] | None:
        """What the next token's numbers depend on; None where it is not marked."""
        width = self.config.context_width
        if len(answer) < width:
            return None
        context = tuple(answer[-width:])
        return None if context in self._seen else context

    def advance(self, answer: Sequence[int]) -> None:
        """Take the context of a token that was chosen as marked. answer: before that token."""
        context = self.context(answer)
        if context is not None:
            self._seen.add(context)

    def raise_green(self, logits_V: np.ndarray, answer: Sequence[int]) -> None:
        """Add δ to the green tokens' float32 logits, in place."""
        context = self.context(answer)
        if context is None or self.is_gumbel:
            return
        numbers_V = token_numbers(self.config.key, context, np.arange(len(logits_V)))
        logits_V[numbers_V < self.config.greenlist_ratio] += np.float32(self.config.bias)

    def chosen(self, weights_N: np.ndarray, tokens_N: np.ndarray | None, answer: Sequence[int]) -> int | None:
        """The place of the token with the largest r^(1/p); None where this one is drawn as without a mark.

        weights_N: of the candidates, not normalised, at least one above 0. tokens_N: their ids; None: the whole vocabulary.
        """
        context = self.context(answer)
        if context is None or not self.is_gumbel:
            return None
        tokens_N = np.arange(len(weights_N)) if tokens_N is None else tokens_N
        # the largest r^(1/p) has the smallest -ln(r) / p, whose order a factor of p does not change
        with np.errstate(divide="ignore"):
            return int(np.argmin(-np.log(token_numbers(self.config.key, context, tokens_N)) / weights_N))


def token_numbers(key: str, context: Sequence[int], tokens_N: np.ndarray) -> np.ndarray:
    """The number of each token after a context, uniform in (0, 1), float64 (N,).

    A keyed hash of the context seeds SplitMix64, whose output at a token's id is that token's number.
    """
    hashed = hashlib.blake2b(np.asarray(context, "<i8").tobytes(), digest_size=8, key=_hash_key(key))
    # arrays of integers wrap around without a warning
    mixed_N = tokens_N.astype(np.uint64) * _STEP + np.array([int.from_bytes(hashed.digest(), "little")], np.uint64)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(30))) * _FIRST
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(27))) * _SECOND
    mixed_N ^= mixed_N >> np.uint64(31)
    return ((mixed_N >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _hash_key(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), person=b"bessemer mark").digest()


def detect(tokens: Sequence[int], config: WatermarkConfig) -> Detection:
    """Test a text for a watermark by its tokens. A text that is too short to score any has p-value 1."""
    watermark, scored = Watermark(config), []
    for place, token in enumerate(tokens):
        before = tokens[max(0, place - config.context_width) : place]
        context = watermark.context(before)
        if context is not None:
            scored.append(token_numbers(config.key, context, np.array([token]))[0])
            watermark.advance(before)
    if not scored:
        return Detection(0, 0.0, 1.0)
    numbers_T = np.array(scored)
    return _gumbel(numbers_T) if watermark.is_gumbel else _green(numbers_T, config.greenlist_ratio)


def _gumbel(numbers_T: np.ndarray) -> Detection:
    """The upper tail of Gamma(T, 1) at S: that fewer than T events of a Poisson process come within S."""
    count, total = len(numbers_T), float(-np.log1p(-numbers_T).sum())
    events = np.arange(count)
    return Detection(
        count, (total - count) / math.sqrt(count), _sum_of_exp(events * math.log(total) - total - _log_factorial(events))
    )


def _green(numbers_T: np.ndarray, ratio: float) -> Detection:
    """The upper tail of the binomial distribution. What is as green counts by a share that is uniform without a mark and
    independent of the count, so that p-values are uniform and not in steps: the sum, modulo 1, of each number's place
    among the green or among the others."""
    count = len(numbers_T)
    is_green_T = numbers_T < ratio
    green = int(is_green_T.sum())
    counts = np.arange(green, count + 1)
    logs = _log_factorial(np.array([count])) - _log_factorial(counts) - _log_factorial(count - counts)
    logs = logs + counts * math.log(ratio) + (count - counts) * math.log1p(-ratio)
    share = float(np.where(is_green_T, numbers_T / ratio, (numbers_T - ratio) / (1 - ratio)).sum() % 1)
    p_value = _sum_of_exp(logs[1:]) + share * math.exp(logs[0])
    return Detection(count, (green - ratio * count) / math.sqrt(count * ratio * (1 - ratio)), min(p_value, 1.0))


def _log_factorial(counts: np.ndarray) -> np.ndarray:
    return np.array([math.lgamma(one + 1) for one in counts.tolist()])


def _sum_of_exp(logs: np.ndarray) -> float:
    """Of numbers that may be too small for a float; at most 1."""
    if not len(logs):
        return 0.0
    largest = float(logs.max())
    return min(1.0, math.exp(largest) * float(np.exp(logs - largest).sum()))
