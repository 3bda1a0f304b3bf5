"""Scores `model_written`: text that a language model wrote, or that reads like the output of one gone wrong.

Three measures. *Phrases*: what models say of themselves, how assistants open and close, and turns that they use far more
often than people (`word_lists/model_written.yaml`), r / (r + h) with r their weight in a hundred words. *Repetition*: the share
of words inside a five-word sequence that occurred before in the text, which in degenerate output is nearly all. *Monotony*:
how far the variety of words falls short of what texts of that length have. The score joins phrases and the worse of the
other two as independent evidence: 1 − (1 − phrases)(1 − degeneration).

A model that was told to write plainly leaves none of these traces: a low score proves nothing.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from bessemer.data.filters.measures import rounded
from bessemer.data.filters.surface import surface
from bessemer.data.filters.toxicity import saturated
from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.ascii import small
from bessemer.data.word_lists.term_matcher import TermMatcher, packaged_term_matcher

_SHORTEST = 50
_HALF_PHRASES = 1.3
_SEQUENCE = 5
_SPACE = ord(" ")
#: Repetition and monotony below this are found in any text: lists, tables, refrains.
_USUAL_REPETITION = 0.35
_USUAL_MONOTONY = 0.55
#: Words of the entropy that ordinary English has at n words: bits ≈ a + b · log2 n (fitted on documentation and prose).
_ENTROPY_AT_ONE, _ENTROPY_PER_DOUBLING = 0.9, 0.72
_FEWEST_WORDS = 40


def model_written(texts: Texts, matcher: TermMatcher | None = None) -> dict[str, pa.Array]:
    """The scores of each text; `matcher` replaces our own phrases, whatever its categories."""
    occurrences, _ = (matcher or packaged_term_matcher("model_written")).count(texts)
    words = surface(texts).words
    phrases = saturated(occurrences.sum(1) * 100.0 / np.maximum(words, _SHORTEST), _HALF_PHRASES)
    repetition, entropy = _variety(texts.data, texts.offsets)
    usual = _ENTROPY_AT_ONE + _ENTROPY_PER_DOUBLING * np.log2(np.maximum(words, 2))
    monotony = np.where(words < _FEWEST_WORDS, 0.0, np.clip(1 - entropy / np.minimum(usual, 9.0), 0, 1))
    repetition = np.where(words < _FEWEST_WORDS, 0.0, repetition)
    degeneration = np.maximum(_beyond(repetition, _USUAL_REPETITION), _beyond(monotony, _USUAL_MONOTONY))
    return {
        "model_written_score": rounded(1 - (1 - phrases) * (1 - degeneration)),
        "model_written_phrases": rounded(phrases),
        "model_written_repetition": rounded(repetition),
        "model_written_monotony": rounded(monotony),
    }


def _beyond(share: np.ndarray, usual: float) -> np.ndarray:
    return np.clip((share - usual) / (1 - usual), 0, 1)


@compiled_allocating
def _variety(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each text the share of its words in repeated sequences, and the entropy of its words in bits.

    Words are runs of bytes above the space, without case; they are compared by 64-bit hashes.
    """
    texts = len(offsets) - 1
    repetition, entropy = np.zeros(texts), np.zeros(texts)
    longest = 1
    for text in range(texts):
        longest = max(longest, (offsets[text + 1] - offsets[text]) // 2 + 1)
    hashes = np.empty(longest, np.uint64)
    size = 16
    while size < 2 * longest:
        size *= 2
    sequences, words = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
    counts = np.zeros(size, np.int64)
    for text in range(texts):
        count = _hash_words(data, offsets[text], offsets[text + 1], hashes)
        if count < 2:
            continue
        used = 16
        while used < 2 * count:
            used *= 2
        sequences[:used] = 0
        words[:used] = 0
        counts[:used] = 0
        mask = np.uint64(used - 1)
        # up to which word repeated sequences reach, and how many words they have
        covered, repeated = 0, 0
        for place in range(count):
            slot = hashes[place] & mask
            while words[slot] != 0 and words[slot] != hashes[place]:
                slot = (slot + np.uint64(1)) & mask
            words[slot] = hashes[place]
            counts[slot] += 1
            if place + _SEQUENCE <= count:
                key = np.uint64(1)
                for offset in range(_SEQUENCE):
                    key = (key ^ hashes[place + offset]) * np.uint64(0x9E3779B97F4A7C15)
                    key ^= key >> np.uint64(29)
                key |= np.uint64(1)
                slot = (key >> np.uint64(20)) & mask
                while sequences[slot] != 0 and sequences[slot] != key:
                    slot = (slot + np.uint64(1)) & mask
                if sequences[slot] == key:
                    repeated += place + _SEQUENCE - max(covered, place)
                    covered = place + _SEQUENCE
                sequences[slot] = key
        repetition[text] = repeated / count
        bits = 0.0
        for slot in range(used):
            if counts[slot]:
                share = counts[slot] / count
                bits -= share * np.log2(share)
        entropy[text] = bits
    return repetition, entropy


@compiled
def _hash_words(data: np.ndarray, first: int, last: int, hashes: np.ndarray) -> int:
    count = 0
    at = first
    while at < last:
        if data[at] <= _SPACE:
            at += 1
            continue
        value = np.uint64(0xCBF29CE484222325)
        while at < last and data[at] > _SPACE:
            value = (value ^ np.uint64(small(data[at]))) * np.uint64(0x100000001B3)
            at += 1
        value = (value ^ (value >> np.uint64(32))) * np.uint64(0xFF51AFD7ED558CCD)
        hashes[count] = (value ^ (value >> np.uint64(32))) | np.uint64(1)
        count += 1
    return count
