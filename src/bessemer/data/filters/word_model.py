"""Score `perplexity` in bits per byte, and a word language model for it, CCNet's measure (Wenzek et al. 2020).

Any function from texts to bits per byte will do; the pipeline passes in what opens a trained model of ours. Ours here is
interpolated Kneser–Ney of order three (Kneser and Ney 1995; Chen and Goodman 1998, section 2.7), without PyTorch:

    P_n(w | h) = (c_n(h w) − D_n) / c_n(h ·) + γ(h) P_{n−1}(w | h')      γ(h) = 1 − Σ over kept w of (c_n(h w) − D_n) / c_n(h ·)

c_3 counts occurrences, c_2 and c_1 different preceding tokens; D_n = n₁ / (n₁ + 2 n₂); P_0 is uniform; γ also holds when rare
trigrams are left out. A token is a word with the space before it, or a single other byte. A word seen once is spelt by a model
of pairs of bytes (Witten and Bell 1991), so any text has a probability. Unusual text is not always bad, and the least
surprising texts are often copies: take a limit from the score's histogram.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bessemer.core.config import Config, setting
from bessemer.core.errors import ArtefactError, SourceError
from bessemer.core.metrics import size
from bessemer.core.progress import Progress, Silent
from bessemer.core.store import follow
from bessemer.data.filters.classifier_training import read_examples
from bessemer.data.text.characters import in_word
from bessemer.data.text.compiled import compiled, compiled_allocating, longest_text
from bessemer.data.text.texts import Texts

#: From N texts to (N,) bits per byte.
BitsPerByte = Callable[[Texts], np.ndarray]
#: Opens the folder of a language model of ours.
OpenModel = Callable[[Path], BitsPerByte]

#: A neural model's last digits differ between processors; the score is rounded so that the files do not.
_DECIMALS = 4


def language_model_folder(place: Path) -> Path | None:
    """The folder of the language model in a folder, a run or a stage; None where there is none."""
    return next((folder for folder in (place, follow(place / "model")) if (folder / "config.json").is_file()), None)


def perplexity_scores(bits_per_byte: BitsPerByte) -> Callable[[Texts], dict[str, pa.Array]]:
    """The scorer of a model, given its function from N texts to (N,) bits per byte."""

    def perplexity(texts: Texts) -> dict[str, pa.Array]:
        return {"perplexity_bits_per_byte": pa.array(np.round(bits_per_byte(texts), _DECIMALS).astype(np.float64))}

    return perplexity


FORMAT = 1
#: Numbers of special tokens: 0 before the first and behind the last, 1 for tokens outside the vocabulary.
_EDGE, _UNKNOWN, _FIRST_KNOWN = 0, 1, 2
# bits of a token's number in a packed n-gram
_BITS = 21
_LARGEST_VOCABULARY = (1 << _BITS) - 1 - _FIRST_KNOWN
_SPELLING_EDGE = 256
_FEWEST_BYTES = 1000


class WordModelConfig(Config):
    """How a model of words is trained."""

    vocabulary: int = setting(
        200_000, "most different tokens known, the most frequent first", unit="tokens", ge=1, le=_LARGEST_VOCABULARY
    )
    fewest_trigrams: int = setting(1, "trigrams that occur less often are left out of the table", ge=1)


@dataclass(frozen=True)
class WordModel:
    """The tables. Those of words, bigrams and trigrams are (slots, 2) uint64: a key by open addressing, 0 where the slot is
    free, and next to it, for one read of memory, the bits of a number or of two logarithms (float32, base 2).
    """

    # hash of a token → its number
    words: np.ndarray
    # (tokens, 2) float32: log P₁, log γ
    unigrams: np.ndarray
    # packed pair of numbers → log P₂ and log γ
    bigrams: np.ndarray
    # packed triple of numbers → log P₃
    trigrams: np.ndarray
    # (257, 257): log P(next byte or end | byte or beginning)
    spelling: np.ndarray

    def bits(self, texts: Texts) -> np.ndarray:
        """The information of each text with its end, in bits, float64."""
        return _bits(texts.data, texts.offsets, *(getattr(self, name) for name in _TABLES))

    def bits_per_byte(self, texts: Texts) -> np.ndarray:
        """The same by the text's bytes; 0 for an empty text."""
        lengths = np.diff(texts.offsets)
        return np.where(lengths, self.bits(texts) / np.maximum(lengths, 1), 0.0)

    def save(self, folder: Path, described: dict[str, Any]) -> None:
        """Write `word_model.json` and `word_model.npz` into a folder that exists."""
        np.savez(folder / "word_model.npz", **{name: getattr(self, name) for name in _TABLES})
        text = json.dumps({"format": FORMAT} | described, indent=2) + "\n"
        (folder / "word_model.json").write_text(text, encoding="utf-8")


_TABLES = ("words", "unigrams", "bigrams", "trigrams", "spelling")


def train_word_model(
    examples: Path, out: Path, config: WordModelConfig | None = None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Train on the texts below a folder and write the model to `out`, which exists. Returns what it is.

    The files may be of any kind that a classifier learns from. Raises SourceError where they cannot be read or hold less
    than a kilobyte.
    """
    config, progress = config or WordModelConfig(), progress or Silent()
    texts = Texts.of(read_examples(examples))
    amount = int(texts.offsets[-1])
    if amount < _FEWEST_BYTES:
        raise SourceError(f"{examples}: {amount} bytes of text are too few for a model of words")
    progress.say(f"counting the words of {len(texts):,} texts, {size(amount)}")
    model = fit_words(texts, config)
    described = {
        "texts": len(texts),
        "bytes": amount,
        "settings": config.output_settings(),
        "unigrams": len(model.unigrams),
        "bigrams": int((model.bigrams[:, 0] != 0).sum()),
        "trigrams": int((model.trigrams[:, 0] != 0).sum()),
    }
    model.save(out, described)
    return described


def load_word_model(folder: Path) -> WordModel:
    """Open a model's folder. Raises ArtefactError where it is not one, or is damaged or of a newer format."""
    try:
        described = json.loads((folder / "word_model.json").read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise ArtefactError(f"{folder}: this model of words has format {described['format']}, and {FORMAT} is known here")
        with np.load(folder / "word_model.npz", allow_pickle=False) as tables:
            return WordModel(**{name: tables[name] for name in _TABLES})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder}: this is no model of words, or a damaged one ({error})") from None


def fit_words(texts: Texts, config: WordModelConfig) -> WordModel:
    """The model of these texts. The order of texts does not matter."""
    hashes, begins, ends, predicted = _tokens(texts.data, texts.offsets)
    inside = hashes != 0
    different, first, numbers, counts = np.unique(hashes[inside], return_index=True, return_inverse=True, return_counts=True)
    known = _most_frequent(different, counts, config.vocabulary)
    renumbered = np.full(len(different), _UNKNOWN, np.int64)
    renumbered[known] = np.arange(_FIRST_KNOWN, _FIRST_KNOWN + len(known))
    tokens = np.full(len(hashes), _EDGE, np.int64)
    tokens[inside] = renumbered[numbers]

    spelt = np.setdiff1d(np.arange(len(different)), known, assume_unique=True)
    places = np.flatnonzero(inside)[first[spelt]]
    spelling = _spelling(texts.data, begins[places], ends[places])
    tables = _kneser_ney(tokens, predicted, len(known) + _FIRST_KNOWN, config.fewest_trigrams)
    return WordModel(_table(different[known], renumbered[known].astype(np.uint64)), *tables, spelling)


def _most_frequent(hashes: np.ndarray, counts: np.ndarray, most: int) -> np.ndarray:
    """The positions of the tokens that are known, those that occur twice or more, most frequent first, then by hash."""
    order = np.lexsort((hashes, -counts))
    order = order[counts[order] > 1]
    return order[:most]


def _kneser_ney(
    tokens: np.ndarray, predicted: np.ndarray, vocabulary: int, fewest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unigrams, bigrams and trigrams as `WordModel` holds them, from tokens in order.

    `predicted` marks all but the two edges that stand before each text: what an n-gram may end with.
    """
    width = np.uint64(_BITS)
    mask = np.uint64((1 << _BITS) - 1)
    numbers = tokens.astype(np.uint64)
    at = np.flatnonzero(predicted)
    packed = numbers[at - 2] << (width + width) | numbers[at - 1] << width | numbers[at]

    trigrams, trigram_counts = np.unique(packed, return_counts=True)
    bigrams, bigram_counts = np.unique(trigrams & (mask << width | mask), return_counts=True)
    unigram_counts = np.zeros(vocabulary, np.int64)
    ends, continuations = np.unique(bigrams & mask, return_counts=True)
    unigram_counts[ends.astype(np.int64)] = continuations

    discount = _discount(unigram_counts[unigram_counts > 0])
    total = unigram_counts.sum()
    seen = np.maximum(unigram_counts - discount, 0) / total
    one = seen + (1 - seen.sum()) / vocabulary

    two, gamma_one = _interpolated(bigrams, bigram_counts, one[(bigrams & mask).astype(np.int64)], np.ones(len(bigrams), bool))
    unigrams = np.zeros((vocabulary, 2))
    unigrams[:, 0] = np.log2(one)
    contexts, gammas = gamma_one
    unigrams[contexts.astype(np.int64), 1] = np.log2(gammas)

    bigram_at = np.searchsorted(bigrams, trigrams & (mask << width | mask))
    three, gamma_two = _interpolated(trigrams, trigram_counts, two[bigram_at], trigram_counts >= fewest)
    kept = trigram_counts >= fewest

    contexts, gammas = gamma_two
    # contexts at a text's beginning are no predicted bigrams
    pairs = np.union1d(bigrams, contexts)
    values = np.zeros((len(pairs), 2))
    values[:, 0] = np.nan
    values[np.searchsorted(pairs, bigrams), 0] = np.log2(two)
    values[np.searchsorted(pairs, contexts), 1] = np.log2(gammas)
    return (
        unigrams.astype(np.float32),
        _table(pairs + np.uint64(1), _bits_of(values)),
        _table(trigrams[kept] + np.uint64(1), _bits_of(np.column_stack([np.log2(three[kept]), np.zeros(kept.sum())]))),
    )


def _interpolated(
    ngrams: np.ndarray, counts: np.ndarray, shorter: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Probabilities of sorted n-grams, given those under the shorter context; and the different contexts with their γ."""
    discount = _discount(counts)
    contexts, first, group = np.unique(ngrams >> np.uint64(_BITS), return_index=True, return_inverse=True)
    totals = np.add.reduceat(counts, first)[group]
    discounted = (counts - discount) / totals
    gammas = 1 - np.add.reduceat(np.where(kept, discounted, 0.0), first)
    gammas = np.maximum(gammas, 1e-9)
    return discounted + gammas[group] * shorter, (contexts, gammas)


def _discount(counts: np.ndarray) -> float:
    """n₁ / (n₁ + 2 n₂), kept inside (0, 1) where counts are too few to say."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return min(max(once / (once + 2 * twice), 0.1), 0.9) if once else 0.5


def _spelling(data: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """log2 P(byte or end | byte before or beginning), Witten–Bell over the uniform, from tokens of the text."""
    counts = _byte_pairs(data, begins, ends)
    every = counts.sum(0)
    shorter = (
        (every + (every > 0).sum() / 257) / (every.sum() + max((every > 0).sum(), 1)) if every.sum() else np.full(257, 1 / 257)
    )
    followers = (counts > 0).sum(1, keepdims=True)
    totals = counts.sum(1, keepdims=True)
    unseen = totals == 0
    probabilities = np.where(unseen, shorter, (counts + followers * shorter) / np.maximum(totals + followers, 1))
    return np.log2(probabilities).astype(np.float32)


def _bits_of(pairs: np.ndarray) -> np.ndarray:
    """(N, 2) numbers as float32, each pair as one uint64."""
    return np.ascontiguousarray(pairs, dtype=np.float32).view(np.uint64)[:, 0]


def _table(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """An open-addressing table of 2^k slots, at most half of them in use. Packed n-grams are stored as key + 1: 0 is free."""
    table = np.zeros((1 << max(4, (2 * max(len(keys), 1) - 1).bit_length()), 2), np.uint64)
    _insert(table, keys, values)
    return table


_BEGIN = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
_SPACE = ord(" ")
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


@compiled
def _slot(table: np.ndarray, key: np.uint64) -> int:
    """The slot of a key, or the free slot where it belongs."""
    mask = np.uint64(len(table) - 1)
    mixed = key * _SPREAD
    slot = (mixed ^ (mixed >> np.uint64(32))) & mask
    while table[slot, 0] != key and table[slot, 0] != 0:
        slot = (slot + np.uint64(1)) & mask
    return int(slot)


@compiled
def _insert(table: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
    for place in range(len(keys)):
        slot = _slot(table, keys[place])
        table[slot, 0], table[slot, 1] = keys[place], values[place]


@compiled
def _token(data: np.ndarray, at: int, end: int) -> tuple[int, np.uint64]:
    """End and hash (never 0) of the token that begins here: a word with one space before it, or one byte."""
    behind = at + 1
    if in_word(data[at]) or (data[at] == _SPACE and behind < end and in_word(data[behind])):
        while behind < end and in_word(data[behind]):
            behind += 1
    value = _BEGIN
    for place in range(at, behind):
        value = (value ^ np.uint64(data[place])) * _PRIME
    value = (value ^ (value >> np.uint64(32))) * _SPREAD
    return behind, (value ^ (value >> np.uint64(29))) | np.uint64(1)


@compiled_allocating
def _tokens(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All tokens in order, two edges (hash 0) before each text and one behind: hashes, where they begin and end, and which are
    predicted: all but those before a text.
    """
    most = offsets[-1] - offsets[0] + 3 * (len(offsets) - 1)
    hashes = np.zeros(most, np.uint64)
    begins, ends = np.zeros(most, np.int64), np.zeros(most, np.int64)
    predicted = np.ones(most, np.bool_)
    count = 0
    for text in range(len(offsets) - 1):
        predicted[count], predicted[count + 1] = False, False
        count += 2
        at = offsets[text]
        while at < offsets[text + 1]:
            begins[count] = at
            at, hashes[count] = _token(data, at, offsets[text + 1])
            ends[count] = at
            count += 1
        count += 1
    return hashes[:count].copy(), begins[:count].copy(), ends[:count].copy(), predicted[:count].copy()


@compiled_allocating
def _byte_pairs(data: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Counts of pairs of bytes in the tokens: row, the first (256: the beginning); column, the second (256: the end)."""
    counts = np.zeros((257, 257), np.int64)
    for token in range(len(begins)):
        before = _SPELLING_EDGE
        for at in range(begins[token], ends[token]):
            counts[before, data[at]] += 1
            before = int(data[at])
        counts[before, _SPELLING_EDGE] += 1
    return counts


@compiled_allocating
def _bits(
    data: np.ndarray,
    offsets: np.ndarray,
    words: np.ndarray,
    unigrams: np.ndarray,
    bigrams: np.ndarray,
    trigrams: np.ndarray,
    spelling: np.ndarray,
) -> np.ndarray:
    """In three loops over a text's tokens and not in one, so that the reads of memory in each do not wait for one another."""
    bits = np.zeros(len(offsets) - 1)
    longest = longest_text(offsets)
    numbers = np.zeros(longest + 3, np.uint64)
    missing = np.empty(longest + 1, np.int64)
    bigram_logs, trigram_logs = bigrams.view(np.float32), trigrams.view(np.float32)
    width = np.uint64(_BITS)
    for text in range(len(bits)):
        count = 2
        at, end = offsets[text], offsets[text + 1]
        while at < end:
            begin = at
            at, key = _token(data, at, end)
            slot = _slot(words, key)
            if words[slot, 0] == key:
                numbers[count] = words[slot, 1]
            else:
                numbers[count] = _UNKNOWN
                bits[text] += _spelt(data, begin, at, spelling)
            count += 1
        numbers[count] = _EDGE
        count += 1

        left = 0
        for place in range(2, count):
            key = (numbers[place - 2] << (width + width) | numbers[place - 1] << width | numbers[place]) + np.uint64(1)
            slot = _slot(trigrams, key)
            is_known = trigrams[slot, 0] == key
            # 0 where the slot is free
            bits[text] -= trigram_logs[slot, 2]
            missing[left] = place
            left += not is_known
        for number in range(left):
            place = missing[number]
            context = (numbers[place - 2] << width | numbers[place - 1]) + np.uint64(1)
            pair = (numbers[place - 1] << width | numbers[place]) + np.uint64(1)
            # 0 where the slot is free
            bits[text] -= bigram_logs[_slot(bigrams, context), 3]
            slot = _slot(bigrams, pair)
            if bigrams[slot, 0] == pair and bigram_logs[slot, 2] == bigram_logs[slot, 2]:
                bits[text] -= bigram_logs[slot, 2]
            else:
                bits[text] -= unigrams[numbers[place - 1], 1] + unigrams[numbers[place], 0]
    return bits


@compiled
def _spelt(data: np.ndarray, begin: int, end: int, spelling: np.ndarray) -> float:
    """The bits of a token's bytes and its end."""
    bits = 0.0
    before = _SPELLING_EDGE
    for at in range(begin, end):
        bits -= spelling[before, data[at]]
        before = int(data[at])
    return bits - spelling[before, _SPELLING_EDGE]
