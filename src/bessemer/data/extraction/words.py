"""Word score of blocks: weights of hashed words, fitted by logistic regression, for or against main text.

A word, its place among the first two, and a pair among the first six are each hashed into one of `BUCKETS` weights, so that
no list of words is kept. The score of a block is the sum of its weights over the root of their number, and one of the
`FEATURES`.
"""

from __future__ import annotations

import numpy as np

from bessemer.data.extraction.attributes import lower
from bessemer.data.extraction.parsing import Page
from bessemer.data.text.compiled import compiled

BUCKETS = 1 << 14
#: Words of a block that are read, and what is hashed of them at most.
MOST_WORDS, MOST_HASHED = 60, 68
_FNV_START, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_FIRST = np.uint64(0x5BD1E995)
_PASSES, _RATE, _DECAY = 6, 0.1, 1e-4


@compiled
def _bucket(state: np.uint64) -> int:
    return int((state ^ (state >> np.uint64(29))) & np.uint64(BUCKETS - 1))


@compiled
def score_words(
    data: np.ndarray,
    run_starts: np.ndarray,
    run_ends: np.ndarray,
    block_runs: np.ndarray,
    weights: np.ndarray,
    scores: np.ndarray,
    buckets: np.ndarray,
) -> None:
    """Fills `scores`, (B,), and, unless it has no rows, `buckets`, (B, MOST_HASHED) of -1, with the weights that were added."""
    for block in range(len(block_runs) - 1):
        words = hashed = 0
        total = 0.0
        word = before = _FNV_START
        length = 0
        for run in range(block_runs[block], block_runs[block + 1]):
            for place in range(run_starts[run], run_ends[run] + 1):
                byte = np.int64(lower(data[place])) if place < run_ends[run] else 32
                if 97 <= byte <= 122 or byte >= 128 or 48 <= byte <= 57:
                    word = (word ^ np.uint64(48 if byte < 58 else byte)) * _FNV_PRIME
                    length += 1
                elif length:
                    words += 1
                    for kind in range(3):
                        if (kind == 1 and words > 2) or (kind == 2 and not 2 <= words <= 6):
                            continue
                        state = word if kind == 0 else (word ^ _FIRST if kind == 1 else (before * _FNV_PRIME) ^ word)
                        bucket = _bucket(state * _FNV_PRIME)
                        total += weights[bucket]
                        if len(buckets):
                            buckets[block, hashed] = bucket
                        hashed += 1
                    before = word
                    word = _FNV_START
                    length = 0
                if words == MOST_WORDS:
                    break
            if words == MOST_WORDS:
                break
        scores[block] = total / np.sqrt(max(1, hashed))


@compiled
def _descend(
    buckets: np.ndarray,
    targets: np.ndarray,
    importance: np.ndarray,
    order: np.ndarray,
    weights: np.ndarray,
    squares: np.ndarray,
    bias: np.ndarray,
) -> None:
    """One pass of stochastic gradient descent with Adagrad's steps; `bias`, (2,): the constant and its sum of squares."""
    for row in order:
        hashed = 0
        total = 0.0
        while hashed < buckets.shape[1] and buckets[row, hashed] >= 0:
            total += weights[buckets[row, hashed]]
            hashed += 1
        scale = 1.0 / np.sqrt(max(1, hashed))
        slope = (1.0 / (1.0 + np.exp(-(total * scale + bias[0]))) - targets[row]) * importance[row]
        for index in range(hashed):
            bucket = buckets[row, index]
            step = slope * scale + _DECAY * weights[bucket]
            squares[bucket] += step * step
            weights[bucket] -= _RATE * step / np.sqrt(squares[bucket] + 1e-6)
        bias[1] += slope * slope
        bias[0] -= _RATE * slope / np.sqrt(bias[1] + 1e-6)


def fit_words(buckets: np.ndarray, targets: np.ndarray, importance: np.ndarray, seed: int = 0) -> np.ndarray:
    """Weights, (BUCKETS,) float32, for blocks given by their `buckets`, (R, MOST_HASHED), with `targets` of 0 and 1, (R,)."""
    random = np.random.default_rng(seed)
    weights, squares, bias = np.zeros(BUCKETS), np.zeros(BUCKETS), np.zeros(2)
    for _ in range(_PASSES):
        _descend(buckets, targets, importance, random.permutation(len(buckets)), weights, squares, bias)
    return weights.astype(np.float32)


def buckets_of(data: np.ndarray, page: Page) -> np.ndarray:
    """The buckets of each block's words, (B, MOST_HASHED) int32, -1 where there are no more."""
    buckets = np.full((len(page.block_elements), MOST_HASHED), -1, np.int32)
    score_words(
        data, page.run_starts, page.run_ends, page.block_runs, np.zeros(BUCKETS, np.float32), np.empty(len(buckets)), buckets
    )  # fmt: skip
    return buckets


def word_scores(data: np.ndarray, page: Page, weights: np.ndarray) -> np.ndarray:
    """The score of each block, (B,) float64."""
    scores = np.empty(len(page.block_elements))
    score_words(
        data, page.run_starts, page.run_ends, page.block_runs, weights, scores, np.empty((0, MOST_HASHED), np.int32)
    )  # fmt: skip
    return scores
