"""The guard's classifier: one linear function a category on hashed n-grams of short windows of a text. Numpy alone.

A text is read in lower case, in blocks of four words; windows are two, four and eight blocks, and a short text as a whole.
Features of a window are its words, pairs of neighbouring words, and runs of 3 and 4 bytes within and across words, hashed
into 2^bits buckets (Weinberger et al. 2009); in the last eighth of the buckets, where a classifier has any, the concepts of its
words and unordered pairs of these, which languages share. A window with n features of buckets b has a logit for each category
k, and one for belonging to any category at all, in which what several categories share counts once and whole. Both have to
agree:

    l_c = (Σ W[b, c]) / √n + bias_c        p_k = σ( (l_k + l_any) / 2 )

and a text's score is the largest over its windows, so that what stands around a request does not dilute it. Scores are on one
scale: `USUAL_LIMIT` is the threshold of the category that was chosen from the curve of refused ordinary texts
(`classifier_training.py`), so a policy's limit of 0.6 means that threshold, a lower one catches more, a higher one less.

On disk: a `.npz` of `weights` (2^bits, K + 1) int8 and a description in JSON, without pickles; opening it runs no code.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_file

FORMAT = 2
#: The score at a category's threshold: the usual limit of a policy's categories.
USUAL_LIMIT = 0.6
#: Words of a block, and blocks of the sizes of windows. A text of at most `_WHOLE` blocks is a window too.
BLOCK = 4
_WINDOWS = (2, 4, 8)
_WHOLE = 12
#: Distances of the pairs of words, and lengths of the runs of bytes.
_DISTANCES = (1,)
_RUNS = (3, 4)
#: Characters that are scored at once, so that a long text needs no memory of its size.
_STEP = 20_000
#: Characters of a word that are read.
_LONGEST_WORD = 40
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_PRIME = np.uint64(0x100000001B3)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_PAIR = np.uint64(0xD6E8FEB86659FD93)
#: Words with a concept before another such word, with whose concepts it makes pairs.
_BEFORE = 2
#: Letters of the last part of a compound that is looked up by itself.
_TAIL = 6
_UNORDERED = np.uint64(0x2545F4914F6CDD1D)
# Shapes: F features, N blocks, W windows, K categories, C = K + 1 columns, the last of which is any category.


@dataclass(frozen=True)
class BlockFeatures:
    """Buckets of the features of a text, (F,) int32 by block, and where each block's begin, (N + 1,) int64."""

    buckets_F: np.ndarray
    starts_N: np.ndarray

    @property
    def blocks(self) -> int:
        return len(self.starts_N) - 1


@lru_cache(maxsize=65_536)
def _word_hash(word: str) -> int:
    encoded = word.encode("utf-8", "replace")
    return zlib.crc32(encoded) << 32 | zlib.adler32(encoded)


class Concepts:
    """Which concepts a word belongs to. A concept is a list of words of one meaning in several languages; `*` stands for any
    ending, and of several beginnings of a word the longest counts."""

    def __init__(self, words: Mapping[str, Sequence[str]]) -> None:
        self.words = words
        self._exact: dict[str, list[int]] = {}
        self._beginnings: dict[str, list[int]] = {}
        for name, entries in words.items():
            concept = _word_hash(f"concept {name}")
            for entry in entries:
                place = self._beginnings if entry.endswith("*") else self._exact
                place.setdefault(entry.removesuffix("*"), []).append(concept)
        self._known: dict[str, tuple[int, ...]] = {}

    def of(self, word: str) -> tuple[int, ...]:
        """Hashes of the concepts of a word in lower case and without accents."""
        found = self._known.get(word)
        if found is None:
            # behind the apostrophe of an elision; the last part of a compound
            found = self._listed(word) or self._listed(word.rpartition("'")[2])
            for at in range(3, len(word) - _TAIL + 1):
                found = found or self._listed(word[at:], shortest=_TAIL)
            if len(self._known) < 65_536:
                self._known[word] = found
        return found

    def _listed(self, word: str, shortest: int = 3) -> tuple[int, ...]:
        if word in self._exact:
            return tuple(self._exact[word])
        for length in range(len(word), shortest - 1, -1):
            if word[:length] in self._beginnings:
                return tuple(self._beginnings[word[:length]])
        return ()

    def features(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The concepts of the words and their unordered pairs within neighbouring words that have any, uint64, and the place of
        the word that each belongs to, int64."""
        known = self._known
        hashes: list[int] = []
        places: list[int] = []
        for place, word in enumerate(words):
            concepts = known[word] if word in known else self.of(word)
            if concepts:
                hashes += concepts
                places += [place] * len(concepts)
        if not hashes:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        hashes_M, places_M = np.array(hashes, np.uint64), np.array(places)
        # how many words with a concept stand before each
        order_M = np.cumsum(np.diff(places_M, prepend=places_M[0]) > 0)
        found = [(hashes_M, places_M)]
        for shift in range(1, len(hashes_M)):
            apart: np.ndarray = order_M[shift:] - order_M[:-shift]
            if apart.min() > _BEFORE:
                break
            near = (apart > 0) & (apart <= _BEFORE)
            one, other = hashes_M[shift:][near], hashes_M[:-shift][near]
            # the order of verb and object is a language's own
            found.append((((one + other) * _UNORDERED) ^ (one * other), places_M[shift:][near]))
        return np.concatenate([pair for pair, _ in found]), np.concatenate([place for _, place in found])


def first_concept_bucket(bits: int) -> int:
    """Where the last eighth of the buckets begins, which is that of the concepts where there are any."""
    return (1 << bits) // 8 * 7


#: Of a classifier without concepts.
NO_CONCEPTS = Concepts({})


def block_features(text: str, bits: int, concepts: Concepts = NO_CONCEPTS) -> BlockFeatures:
    """The features of a text by blocks of four words. A pair belongs to the block of its second word; a block has each feature
    once."""
    words = [word[:_LONGEST_WORD] for word in _WORD.findall(text.lower())]
    if not words:
        return BlockFeatures(np.zeros(0, np.int32), np.zeros(1, np.int64))
    shift = np.uint64(64 - bits)
    hashes = np.array([_word_hash(word) for word in words], np.uint64)
    places = np.arange(len(words))
    found = [(hashes, places)]
    for distance in _DISTANCES:
        if len(words) > distance:
            pairs = (hashes[:-distance] * _PAIR) ^ (hashes[distance:] + np.uint64(distance))
            found.append((pairs ^ (pairs >> np.uint64(29)), places[distance:]))
    joined = " ".join(words)
    data = np.frombuffer(f" {joined} ".encode("utf-8", "replace"), np.uint8)
    word_of_byte = np.minimum(np.cumsum(data == 32) - 1, len(words) - 1)
    data = data.astype(np.uint64)
    for length in _RUNS:
        count = len(data) - length + 1
        if count < 1:
            continue
        runs = np.full(count, length, np.uint64)
        for offset in range(length):
            runs = (runs ^ data[offset : offset + count]) * _PRIME
        # a run belongs to the word of its middle
        found.append((runs ^ (runs >> np.uint64(32)), word_of_byte[length // 2 : length // 2 + count]))
    buckets = ((np.concatenate([one for one, _ in found]) * _SPREAD) >> shift).astype(np.int64)
    blocks = np.concatenate([place for _, place in found]) // BLOCK
    if concepts.words:
        hashes, of_concepts = concepts.features(words)
        first = first_concept_bucket(bits)
        last_eighth = first + ((hashes * _SPREAD) >> (shift + np.uint64(3))).astype(np.int64)
        buckets = np.concatenate([(buckets * 7) >> 3, last_eighth])
        blocks = np.concatenate([blocks, of_concepts // BLOCK])
    # a block has a feature once, however often its words repeat themselves
    keys = np.sort(blocks << bits | buckets)
    keys = keys[np.diff(keys, prepend=-1) > 0]
    count = (len(words) + BLOCK - 1) // BLOCK
    starts_N = np.searchsorted(keys, np.arange(count + 1) << bits)
    return BlockFeatures((keys & ((1 << bits) - 1)).astype(np.int32), starts_N)


def windows_of(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """The first block of each window and the one behind its last, both (W,) int64, for a text of so many blocks."""
    firsts, ends = [], []
    for size in _WINDOWS:
        if size < blocks:
            firsts.append(np.arange(blocks - size + 1))
            ends.append(firsts[-1] + size)
    if blocks <= _WHOLE:
        firsts.append(np.zeros(1, np.int64))
        ends.append(np.full(1, blocks))
    return np.concatenate(firsts), np.concatenate(ends)


@dataclass(frozen=True)
class GuardClassifier:
    """weights_BC: (2^bits, C) int8; scales_C, biases_C: (C,) float32; thresholds_K: (K,) float32, probabilities."""

    categories: tuple[str, ...]
    bits: int
    weights_BC: np.ndarray
    scales_C: np.ndarray
    biases_C: np.ndarray
    thresholds_K: np.ndarray
    #: How it was made: seeds, texts and their hashes, the curve.
    made: dict[str, Any]
    concepts: Concepts = field(default_factory=lambda: NO_CONCEPTS)
    #: Hash of the file; empty for one in memory.
    hash: str = ""

    def scores(self, text: str) -> np.ndarray:
        """The score of each category for a cleaned text, (K,) float64 in [0, 1]: the largest over its windows. Zeros for a
        text without words."""
        found = np.zeros(len(self.categories))
        # windows of two steps overlap by some words
        for start in range(0, max(1, len(text)), _STEP):
            probabilities = self.probabilities(text[max(0, start - 400) : start + _STEP])
            if len(probabilities):
                np.maximum(found, probabilities.max(0), out=found)
        return self._scaled(found)

    def probabilities(self, text: str) -> np.ndarray:
        """p of each window and category, (W, K)."""
        features = block_features(text, self.bits, self.concepts)
        if not features.blocks:
            return np.zeros((0, len(self.categories)))
        weights_FC = self.weights_BC[features.buckets_F].astype(np.float32)
        sums_NC = np.add.reduceat(weights_FC, features.starts_N[:-1], axis=0)
        totals_NC = np.concatenate([np.zeros((1, sums_NC.shape[1]), np.float32), np.cumsum(sums_NC, axis=0)])
        first_W, end_W = windows_of(features.blocks)
        counts_W = features.starts_N[end_W] - features.starts_N[first_W]
        logits_WC = (totals_NC[end_W] - totals_NC[first_W]) * self.scales_C / np.sqrt(counts_W)[:, None] + self.biases_C
        both_WK = (logits_WC[:, :-1] + logits_WC[:, -1:]) / 2
        return 1 / (1 + np.exp(-both_WK.clip(-40, 40)))

    def _scaled(self, probabilities_K: np.ndarray) -> np.ndarray:
        """Probabilities with each category's threshold moved to `USUAL_LIMIT`, by two straight lines."""
        thresholds = self.thresholds_K.astype(np.float64)
        below = probabilities_K / thresholds * USUAL_LIMIT
        above = USUAL_LIMIT + (probabilities_K - thresholds) / np.maximum(1 - thresholds, 1e-6) * (1 - USUAL_LIMIT)
        return np.where(probabilities_K < thresholds, below, above).clip(0, 1)

    @cached_property
    def described(self) -> dict[str, Any]:
        """What the file says beside the weights."""
        return {
            "format": FORMAT,
            "categories": list(self.categories),
            "bits": self.bits,
            "scales": self.scales_C.tolist(),
            "biases": self.biases_C.tolist(),
            "thresholds": self.thresholds_K.tolist(),
            "concepts": self.concepts.words,
            "made": self.made,
        }

    def save(self, path: Path) -> None:
        """Write the file, the same bytes for the same classifier."""
        description = np.frombuffer(json.dumps(self.described, sort_keys=True).encode(), np.uint8)
        np.savez_compressed(path, description=description, weights=self.weights_BC)


def load_guard_classifier(path: Path) -> GuardClassifier:
    """Open a classifier's file. Raises ArtefactError, in one line, where it is none, is damaged or has a newer format."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            described = json.loads(arrays["description"].tobytes())
            weights = arrays["weights"]
        if described["format"] != FORMAT:
            raise ArtefactError(f"{path}: this guard classifier has format {described['format']}, and {FORMAT} is known here")
        categories, bits = tuple(map(str, described["categories"])), int(described["bits"])
        scales, biases, thresholds = (np.array(described[name], np.float32) for name in ("scales", "biases", "thresholds"))
        if weights.shape != (1 << bits, len(categories) + 1) or weights.dtype != np.int8:
            raise ArtefactError(f"{path}: the weights do not fit the description ({weights.dtype} {weights.shape})")
        if any(len(column) != len(categories) + 1 or not np.isfinite(column).all() for column in (scales, biases)):
            raise ArtefactError(f"{path}: the description has no number for each category and for any")
        if thresholds.shape != (len(categories),):
            raise ArtefactError(f"{path}: the description has no threshold for each category")
        if not ((thresholds > 0) & (thresholds < 1)).all():
            raise ArtefactError(f"{path}: a threshold is no probability")
        made, file_hash = dict(described["made"]), hash_file(path)
        # files from before there were any have none
        concepts = Concepts({str(name): [*map(str, words)] for name, words in described.get("concepts", {}).items()})
        return GuardClassifier(categories, bits, weights, scales, biases, thresholds, made, concepts, file_hash)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zlib.error, zipfile.BadZipFile, OverflowError) as error:
        raise ArtefactError(f"{path}: this is no guard classifier, or a damaged one ({error})") from None


@lru_cache(maxsize=1)
def packaged_classifier() -> GuardClassifier:
    """The classifier that travels with Bessemer."""
    return load_guard_classifier(Path(str(resources.files("bessemer.safety") / "guard_classifier.npz")))
