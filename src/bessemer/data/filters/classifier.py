"""Text classifier of a user's own: logistic regression on hashed n-grams, calibrated to a probability, as a score of `clean`.

Features are words, pairs of neighbouring words and, where set, subwords, each hashed to a bucket (Weinberger et al. 2009).
Words are runs of ASCII letters and digits and of bytes beyond ASCII, without ASCII's case; each other sign that is no white
space is a word. Subwords are runs of bytes inside a word with its ends marked, as in fastText (Bojanowski et al. 2017). x is
the number of times each feature occurs, divided by the root of their number. For two classes fastText's embeddings and linear
layer are the same family of functions; one number per n-gram makes the problem convex.

On disk: `classifier.json` (settings, calibration, measurements) and `weights.npy` (float32). Opening them runs no code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from bessemer.core.errors import ArtefactError
from bessemer.data.filters.measures import rounded
from bessemer.data.text.characters import in_word, small
from bessemer.data.text.compiled import compiled, compiled_allocating, longest_text
from bessemer.data.text.texts import Texts


class Features(NamedTuple):
    """Sequences of up to `word_order` words, subwords of `shortest` to `longest` bytes (0: none), in 2^bits buckets."""

    word_order: int
    shortest: int
    longest: int
    bits: int


def features_of(texts: Texts, features: Features) -> tuple[np.ndarray, np.ndarray]:
    """The buckets of every feature of every text, int32, text after text, and where each text's begin, (N + 1,) int64."""
    _, sizes = summed(texts, features, np.zeros(1 << features.bits, np.float32))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return _fill(texts.data, texts.offsets, features, starts), starts


def summed(texts: Texts, features: Features, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the weights of each text's features, float64, and the number of its features."""
    return _summed(texts.data, texts.offsets, features, weights)


_SPACE = ord(" ")
_BEGIN = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_PIECES = np.uint64(0xD6E8FEB86659FD93)


@compiled_allocating
def _fill(data: np.ndarray, offsets: np.ndarray, features: Features, starts: np.ndarray) -> np.ndarray:
    all_buckets = np.empty(starts[-1], np.int32)
    buckets = np.empty(longest_text(offsets) * (features.word_order + _subwords_per_byte(features)), np.int32)
    words = np.empty(longest_text(offsets), np.uint64)
    for text in range(len(offsets) - 1):
        count = _of_text(data, offsets[text], offsets[text + 1], features, words, buckets)
        all_buckets[starts[text] : starts[text + 1]] = buckets[:count]
    return all_buckets


@compiled_allocating
def _summed(data: np.ndarray, offsets: np.ndarray, features: Features, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sums, sizes = np.zeros(len(offsets) - 1), np.zeros(len(offsets) - 1, np.int64)
    buckets = np.empty(longest_text(offsets) * (features.word_order + _subwords_per_byte(features)), np.int32)
    words = np.empty(longest_text(offsets), np.uint64)
    for text in range(len(sums)):
        sizes[text] = _of_text(data, offsets[text], offsets[text + 1], features, words, buckets)
        total = 0.0
        for place in range(sizes[text]):
            total += weights[buckets[place]]
        sums[text] = total
    return sums, sizes


@compiled
def _subwords_per_byte(features: Features) -> int:
    """More subwords do not begin at a byte, the two marks of a word's ends counted to its bytes."""
    return 3 * (features.longest - features.shortest + 1) if features.longest else 0


@compiled
def _of_text(data: np.ndarray, first: int, last: int, features: Features, words: np.ndarray, buckets: np.ndarray) -> int:
    """Write the buckets of one text's features; return how many."""
    shift = np.uint64(64 - features.bits)
    count, filled = 0, 0
    at = first
    while at < last:
        if data[at] <= _SPACE:
            at += 1
            continue
        begin = at
        value = _BEGIN
        if in_word(data[at]):
            while at < last and in_word(data[at]):
                value = (value ^ np.uint64(small(data[at]))) * _PRIME
                at += 1
        else:
            value = (value ^ np.uint64(data[at])) * _PRIME
            at += 1
        value ^= value >> np.uint64(32)
        words[count] = value
        sequence = value
        for order in range(features.word_order):
            if order > count:
                break
            if order:
                sequence = (sequence ^ (words[count - order] * _PIECES)) * _SPREAD
                sequence ^= sequence >> np.uint64(31)
            buckets[filled] = np.int32((sequence * _SPREAD) >> shift)
            filled += 1
        count += 1
        if features.longest:
            filled = _subwords(data, begin, at, features, shift, buckets, filled)
    return filled


@compiled
def _subwords(
    data: np.ndarray, begin: int, end: int, features: Features, shift: np.uint64, buckets: np.ndarray, filled: int
) -> int:
    """Append the subwords of one word, marked at both ends by a byte that text does not have."""
    length = end - begin + 2
    for start in range(length - features.shortest + 1):
        value = _PIECES
        for offset in range(min(features.longest, length - start)):
            place = start + offset
            byte = np.uint8(1) if place == 0 or place == length - 1 else small(data[begin + place - 1])
            value = (value ^ np.uint64(byte)) * _PRIME
            if offset + 1 >= features.shortest:
                buckets[filled] = np.int32(((value ^ (value >> np.uint64(32))) * _SPREAD) >> shift)
                filled += 1
    return filled


FORMAT = 1


@dataclass(frozen=True)
class Classifier:
    """`weights` (2^bits,) float32; the probability that a text is good is σ(slope · logit + intercept)."""

    name: str
    features: Features
    weights: np.ndarray
    bias: float
    slope: float
    intercept: float
    measured: dict[str, Any]

    def logits(self, texts: Texts) -> np.ndarray:
        """Of each text (Σ weights) / √n + bias over its n features; the bias alone for a text without any."""
        sums, sizes = summed(texts, self.features, self.weights)
        return sums / np.sqrt(np.maximum(sizes, 1)) + self.bias

    def probabilities(self, texts: Texts) -> np.ndarray:
        """Probability that each text is good, float64 in [0, 1]."""
        return sigmoid(self.slope * self.logits(texts) + self.intercept)

    def save(self, folder: Path) -> None:
        """Write the two files into a folder that exists."""
        np.save(folder / "weights.npy", self.weights, allow_pickle=False)
        described = {
            "format": FORMAT,
            "name": self.name,
            "features": self.features._asdict(),
            "bias": self.bias,
            "slope": self.slope,
            "intercept": self.intercept,
            "measured": self.measured,
        }
        (folder / "classifier.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: Path) -> Classifier:
    """Open a classifier's folder. Raises ArtefactError where it is not one, or is damaged or of a newer format."""
    try:
        described = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
        weights = np.load(folder / "weights.npy", allow_pickle=False)
        if described["format"] != FORMAT:
            raise ArtefactError(f"{folder}: this classifier has format {described['format']}, and {FORMAT} is known here")
        features = Features(**described["features"])
        numbers = {name: float(described[name]) for name in ("bias", "slope", "intercept")}
        if weights.shape != (1 << features.bits,) or weights.dtype != np.float32:
            raise ArtefactError(f"{folder}: the weights do not fit the classifier ({weights.dtype} {weights.shape})")
        return Classifier(described["name"], features, weights, measured=described["measured"], **numbers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder}: this is no classifier, or a damaged one ({error})") from None


def classifier_columns(classifier: Classifier) -> dict[str, pa.DataType]:
    """The column that a classifier writes: `classifier_NAME`."""
    return {f"classifier_{re.sub(r'[^a-z0-9]+', '_', classifier.name.lower()).strip('_') or 'score'}": pa.float64()}


def classifier_meaning(classifier: Classifier) -> dict[str, str]:
    """The description of that column."""
    (column,) = classifier_columns(classifier)
    return {column: f"how probably the text is {classifier.name!r}, by the classifier trained on examples (0 to 1)"}


def classifier_scores(classifier: Classifier) -> Callable[[Texts], dict[str, pa.Array]]:
    """The scorer that applies a classifier."""
    (column,) = classifier_columns(classifier)
    return lambda texts: {column: rounded(classifier.probabilities(texts))}


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + e^−x), without overflow."""
    return np.where(logits >= 0, 1 / (1 + np.exp(-np.abs(logits))), 1 - 1 / (1 + np.exp(-np.abs(logits))))
