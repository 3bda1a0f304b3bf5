"""Scores by lists of words and patterns: `toxicity`, `spam`, `hazards`, `model_written`, and `words` with a user's own lists.

The lists are `word_lists/*.yaml`. `toxicity`: r / (r + h), r the weight of hits in a hundred words (at least 40 words), h the
weight that makes one half. `spam`: a logistic function of phrases, links, shouting and currency marks, fitted on half of
`benchmarks/marks`. `hazards` (MLCommons S1 to S14): 1 - exp(-w · √(100 / max(words, 100))), w the weight of different hits.
`words`: weighted hits by category and their share of the words. `model_written`: phrases of assistants, joined as independent
evidence with the worse of repetition (five-word sequences that occurred before) and monotony (too little variety of words).

Lists know no context: they miss contempt in polite words and find quotations (docs/scores.md has the figures). Surface counts
take one pass over the bytes; words are runs of bytes other than ASCII white space, capitals are ASCII's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from bessemer.core.errors import ConfigError
from bessemer.data.filters.measures import rounded
from bessemer.data.filters.registry import HAZARD_CATEGORIES
from bessemer.data.text.characters import is_capital, is_digit, is_letter, small
from bessemer.data.text.compiled import compiled, compiled_allocating, longest_text
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.term_matcher import TermMatcher, packaged_term_matcher, term_matcher_of


class Surface(NamedTuple):
    """Counts by text, each (N,) int64."""

    words: np.ndarray
    #: of ASCII
    letters: np.ndarray
    #: letters of words with at least three capitals and no small letter
    shouted: np.ndarray
    #: $ £ €, and % behind a digit
    currency: np.ndarray
    #: `http` or `www.` at the beginning of a word or behind a bracket or quote
    links: np.ndarray


_FIELDS = len(Surface._fields)
_SPACE, _DOLLAR, _PERCENT, _DOT, _SLASH, _COLON = (ord(sign) for sign in " $%./:")
_H, _P, _S, _T, _W = (ord(letter) for letter in "hpstw")
#: `£` and `€` in UTF-8.
_POUND_1, _POUND_2 = "£".encode()
_EURO_1, _EURO_2, _EURO_3 = "€".encode()


def surface(texts: Texts) -> Surface:
    """The counts of each text."""
    return Surface(*_surface(texts.data, texts.offsets, np.zeros((_FIELDS, len(texts)), np.int64)))


@compiled_allocating
def _surface(data: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    words, letters, shouted, currency, links = counts
    for text in range(len(offsets) - 1):
        at, end = offsets[text], offsets[text + 1]
        while at < end:
            if data[at] <= _SPACE:
                at += 1
                continue
            capitals, small, digits = 0, 0, 0
            while at < end and data[at] > _SPACE:
                byte = data[at]
                if is_capital(byte):
                    capitals += 1
                elif is_letter(byte):
                    small += 1
                    links[text] += _link(data, at, end, offsets[text])
                elif is_digit(byte):
                    digits += 1
                elif byte == _DOLLAR:
                    currency[text] += 1
                elif byte == _PERCENT:
                    currency[text] += digits > 0
                elif byte == _POUND_1 and at + 1 < end:
                    currency[text] += data[at + 1] == _POUND_2
                elif byte == _EURO_1 and at + 2 < end:
                    currency[text] += data[at + 1] == _EURO_2 and data[at + 2] == _EURO_3
                at += 1
            words[text] += 1
            letters[text] += capitals + small
            shouted[text] += capitals if capitals >= 3 and small == 0 else 0
    return counts


@compiled
def _link(data: np.ndarray, at: int, end: int, first: int) -> bool:
    """Whether `http:`, `https:` or `www.` begins here, behind no letter, digit, dot or slash."""
    byte = data[at]
    if (byte != _H and byte != _W) or at + 5 > end:
        return False
    if at > first:
        before = data[at - 1]
        if is_letter(before) or is_digit(before) or before in (_SLASH, _DOT):
            return False
    if byte == _W:
        return bool(data[at + 1] == _W and data[at + 2] == _W and data[at + 3] == _DOT)
    if data[at + 1] != _T or data[at + 2] != _T or data[at + 3] != _P:
        return False
    return bool(data[at + 4] == _COLON or (data[at + 4] == _S and at + 5 < end and data[at + 5] == _COLON))


_ATTACKS = ("insults", "slurs", "hate", "threats")
_TOXICITY_MIN_WORDS = 40
#: Weight in a hundred words that makes a score of one half.
_HALF_ATTACK = 1.4
_HALF_EXPLICIT = 1.6
#: Most that swearing adds to the attack weight in a hundred words; below `_HALF_ATTACK`, since swearing alone attacks nobody.
_MOST_SWEARING = 1.1


def toxicity(texts: Texts, matcher: TermMatcher | None = None) -> dict[str, pa.Array]:
    """The scores of each text; `matcher` replaces our own lists by ones with the same categories."""
    matcher = matcher or packaged_term_matcher("toxicity")
    occurrences, _ = matcher.count(texts)
    of = {name: occurrences[:, number] for number, name in enumerate(matcher.names)}
    none = np.zeros(len(texts))
    attacks = sum((of.get(name, none) for name in _ATTACKS), none)
    per_hundred = 100.0 / np.maximum(surface(texts).words, _TOXICITY_MIN_WORDS)
    swearing = np.minimum(of.get("profanity", none) * per_hundred, _MOST_SWEARING)
    attack = attacks * per_hundred + swearing
    return {
        "toxicity_score": pa.array(saturated(attack, _HALF_ATTACK)),
        "toxicity_nsfw": pa.array(saturated(of.get("nsfw", none) * per_hundred, _HALF_EXPLICIT)),
    }


def saturated(amount: np.ndarray, half: float) -> np.ndarray:
    """amount / (amount + half): 0 for nothing, one half for `half`, towards 1 for ever more."""
    return amount / (amount + half)


FEATURES = ("phrases", "phrase_density", "links", "shouting", "currency")
_COEFFICIENTS = np.array([1.65, 2.4, 0.25, 0.4, 0.15])
_INTERCEPT = -4.0
_SPAM_MIN_WORDS = 30


def spam(texts: Texts, matcher: TermMatcher | None = None) -> dict[str, pa.Array]:
    """The score of each text; `matcher` replaces our own phrases, whatever its categories."""
    logits = spam_features(texts, matcher) @ _COEFFICIENTS + _INTERCEPT
    return {"spam_score": rounded(1 / (1 + np.exp(-logits)))}


def spam_features(texts: Texts, matcher: TermMatcher | None = None) -> np.ndarray:
    """The measures of each text, (N, `FEATURES`) float64, each a logarithm so that more of the same adds less."""
    occurrences, distinct = (matcher or packaged_term_matcher("spam")).count(texts)
    seen = surface(texts)
    per_hundred = 100.0 / np.maximum(seen.words, _SPAM_MIN_WORDS)
    return np.log1p(
        np.column_stack(
            [
                distinct.sum(1),
                occurrences.sum(1) * per_hundred,
                seen.links * per_hundred,
                100.0 * seen.shouted / np.maximum(seen.letters, 100),
                seen.currency * per_hundred,
            ]
        )
    )


_HAZARDS_MIN_WORDS = 100


def hazards(texts: Texts, matcher: TermMatcher | None = None) -> dict[str, pa.Array]:
    """The score of each category for each text. Categories that `matcher` does not have score zero."""
    matcher = matcher or packaged_term_matcher("hazards")
    _, distinct = matcher.count(texts)
    diluted = 1 / np.sqrt(np.maximum(surface(texts).words, _HAZARDS_MIN_WORDS) / _HAZARDS_MIN_WORDS)
    scores = {name: 1 - np.exp(-distinct[:, number] * diluted) for number, name in enumerate(matcher.names)}
    none = np.zeros(len(texts))
    return {f"hazards_{name}": rounded(scores.get(name, none)) for name in HAZARD_CATEGORIES}


class WordsScorer(NamedTuple):
    """A scorer made from a list: its columns, what each means, and the function."""

    columns: dict[str, pa.DataType]
    descriptions: dict[str, str]
    function: Callable[[Texts], dict[str, pa.Array]]


def words_scorer(path: Path) -> WordsScorer:
    """Columns `words_CATEGORY_hits` and `words_CATEGORY_share` (hits by words, 0 in a text without words).

    Raises ConfigError when the list cannot be read, or two of its categories would have one column.
    """
    matcher = term_matcher_of(path)
    names = [re.sub(r"\W+", "_", name).strip("_").lower() for name in matcher.names]
    if len(set(names)) < len(names) or not all(names):
        raise ConfigError(f"{path}: each category needs a name of its own, of letters, digits and underscores")
    descriptions: dict[str, str] = {}
    for name, category in zip(names, matcher.categories.values(), strict=True):
        what = category.meaning or f"of the list {category.name!r}"
        descriptions |= {f"words_{name}_hits": f"hits: {what}", f"words_{name}_share": f"hits by words: {what}"}
    return WordsScorer(dict.fromkeys(descriptions, pa.float64()), descriptions, lambda texts: _words(texts, matcher, names))


def _words(texts: Texts, matcher: TermMatcher, names: list[str]) -> dict[str, pa.Array]:
    occurrences, _ = matcher.count(texts)
    words = np.maximum(surface(texts).words, 1)
    columns = {}
    for number, name in enumerate(names):
        columns[f"words_{name}_hits"] = pa.array(occurrences[:, number].copy())
        columns[f"words_{name}_share"] = pa.array(occurrences[:, number] / words)
    return columns


_MODEL_WRITTEN_MIN_WORDS = 50
_HALF_PHRASES = 1.3
_SEQUENCE = 5
_BLANK = ord(" ")
#: Repetition and monotony up to here are usual in human text: lists, tables, refrains.
_USUAL_REPETITION = 0.35
_USUAL_MONOTONY = 0.55
#: Words of the entropy that ordinary English has at n words: bits ≈ a + b · log2 n (fitted on documentation and prose).
_ENTROPY_AT_ONE, _ENTROPY_PER_DOUBLING = 0.9, 0.72
_FEWEST_WORDS = 40


def model_written(texts: Texts, matcher: TermMatcher | None = None) -> dict[str, pa.Array]:
    """The scores of each text; `matcher` replaces our own phrases, whatever its categories."""
    occurrences, _ = (matcher or packaged_term_matcher("model_written")).count(texts)
    words = surface(texts).words
    phrases = saturated(occurrences.sum(1) * 100.0 / np.maximum(words, _MODEL_WRITTEN_MIN_WORDS), _HALF_PHRASES)
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
    longest = longest_text(offsets) // 2 + 1
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
        # end of the last repeated sequence, and the words in repeated sequences
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
        if data[at] <= _BLANK:
            at += 1
            continue
        value = np.uint64(0xCBF29CE484222325)
        while at < last and data[at] > _BLANK:
            value = (value ^ np.uint64(small(data[at]))) * np.uint64(0x100000001B3)
            at += 1
        value = (value ^ (value >> np.uint64(32))) * np.uint64(0xFF51AFD7ED558CCD)
        hashes[count] = (value ^ (value >> np.uint64(32))) | np.uint64(1)
        count += 1
    return count
