"""Baselines of bits per byte: `xz`, and an interpolated Witten–Bell n-gram model over bytes.

    P_n(w | h) = (c(h, w) + T(h) · P_{n−1}(w | h')) / (c(h) + T(h))

h is the n−1 symbols before w, h' is h without its oldest symbol, c counts in the training text, and T(h) is the number of
different symbols seen after h: the more of them, the larger the weight of the shorter context (Witten and Bell 1991; Chen and
Goodman 1998, section 2.4). P_0 is uniform. For an unseen h, P_n is P_{n−1}.

The symbols are the 256 bytes and an end of document, which also pads the contexts before a document's first byte: documents are
independent. The end counts in the bits and not in the bytes, as the model's end token in `training.validation`.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

END = 256
SYMBOLS = 257
#: Bits of a symbol in a packed n-gram.
_BITS = 9
LONGEST_ORDER = 64 // _BITS


def witten_bell_bits_per_byte(train: Sequence[bytes], validation: Sequence[bytes], orders: Iterable[int]) -> dict[int, float]:
    """Bits per byte of `validation` under models of these orders trained on `train`; a document is one item.

    All orders cost as much as the highest, which is computed from the lower ones: for 30 MB at order 6 about five seconds and
    1 GB. Raises ValueError for an order outside 1 … 7.
    """
    wanted = sorted(set(orders))
    size = sum(map(len, validation))
    bits_per_byte = {}
    for order, probabilities in enumerate(witten_bell(train, validation, wanted[-1]), start=1):
        if order in wanted:
            bits_per_byte[order] = float(-np.log2(probabilities).sum() / size)
    return bits_per_byte


def witten_bell(train: Sequence[bytes], validation: Sequence[bytes], order: int) -> Iterator[np.ndarray]:
    """The probability of each symbol of `validation` given those before it, under orders 1, 2, … `order` in turn.

    Yields float64 arrays of the same length: each document's bytes and its end, document after document.
    Raises ValueError for an order outside 1 … 7.
    """
    if not 1 <= order <= LONGEST_ORDER:
        raise ValueError(f"an n-gram of order {order} cannot be packed into 64 bits; use 1 to {LONGEST_ORDER}")
    counted, validation_symbols = _counts(_Symbols(train, order), order), _Symbols(validation, order)
    probabilities = np.full(len(validation_symbols), 1 / SYMBOLS)
    for ngrams, ngram_counts in counted:
        contexts, followers, first = _runs(ngrams >> _BITS)
        context_counts = np.add.reduceat(ngram_counts, first)

        queries = validation_symbols.longer_ngrams()
        # sorted look-ups are several times faster: neighbours share cache lines
        positions = np.argsort(queries)
        queries, shorter = queries[positions], probabilities[positions]
        at_ngram, ngram_known = _find(ngrams, queries)
        at_context, context_known = _find(contexts, queries >> _BITS)
        count = np.where(ngram_known, ngram_counts[at_ngram], 0)
        context_count, follower_count = context_counts[at_context], followers[at_context]
        longer = (count + follower_count * shorter) / (context_count + follower_count)
        probabilities[positions] = np.where(context_known, longer, shorter)
        yield probabilities.copy()


def _counts(symbols: _Symbols, order: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of the orders 1, 2, … `order`: the distinct n-grams, sorted, and their counts.

    One sort serves every order: with the newest symbol in the highest bits, n-grams that end alike are adjacent, and dropping
    the lowest symbol gives those of one order less.
    """
    newest_first, counts, _ = _runs(np.sort(symbols.newest_first()))
    by_order = []
    for length in range(order, 0, -1):
        ngrams = _turned_round(newest_first, length)
        ascending = np.argsort(ngrams)
        by_order.append((ngrams[ascending], counts[ascending]))
        newest_first, _, first = _runs(newest_first >> _BITS)
        counts = np.add.reduceat(counts, first)
    return by_order[::-1]


def _turned_round(ngrams: np.ndarray, length: int) -> np.ndarray:
    """Packed n-grams of `length` symbols with the last symbol first."""
    turned = np.zeros_like(ngrams)
    for place in range(length):
        symbols = (ngrams >> np.uint64(_BITS * place)) & np.uint64((1 << _BITS) - 1)
        turned |= symbols << np.uint64(_BITS * (length - 1 - place))
    return turned


class _Symbols:
    """Documents as one array of symbols, and the n-grams that end at each predicted position.

    An n-gram is packed into 64 bits with its newest symbol lowest, so that a shift by one symbol gives its context, and
    n-grams of one context are adjacent when sorted.
    """

    def __init__(self, documents: Sequence[bytes], order: int) -> None:
        padding = np.full(order - 1, END, np.uint16)
        end = np.array([END], np.uint16)
        parts = [part for text in documents for part in (padding, np.frombuffer(text, np.uint8), end)]
        self._symbols = np.concatenate(parts, dtype=np.uint16)
        self._predicted = np.ones(len(self._symbols), bool)
        starts = np.cumsum([0] + [len(text) + order for text in documents[:-1]])
        self._predicted[(starts[:, None] + np.arange(order - 1)).ravel()] = False
        self._order = order
        self._ngrams = np.zeros(len(self._symbols), np.uint64)
        self._length = 0

    def __len__(self) -> int:
        return int(self._predicted.sum())

    def newest_first(self) -> np.ndarray:
        """The n-grams of the order in reverse: the newest symbol in the highest bits."""
        ngrams = np.zeros(len(self._symbols), np.uint64)
        for age in range(self._order):
            older = self._symbols[: len(self._symbols) - age].astype(np.uint64)
            older <<= np.uint64(_BITS * (self._order - 1 - age))
            ngrams[age:] |= older
        return ngrams[self._predicted]

    def longer_ngrams(self) -> np.ndarray:
        """The n-grams one symbol longer than those of the last call; the first call gives single symbols."""
        older = self._symbols[: len(self._symbols) - self._length].astype(np.uint64)
        older <<= np.uint64(_BITS * self._length)
        self._ngrams[self._length :] |= older
        self._length += 1
        return self._ngrams[self._predicted]


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of sorted values: the distinct ones, their counts, and their first indices."""
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return ordered[first], np.diff(first, append=len(ordered)), first


def _find(keys: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of each query in the sorted `keys`, and whether it is there; if not, the index is any valid one."""
    at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return at, keys[at] == queries


def xz_bits_per_byte(documents: Sequence[bytes]) -> float:
    """Bits per byte of `xz -9` on the documents, joined by line breaks; the bytes are the documents' own.

    A familiar reference, not a comparison on equal terms: the compressor has no training text, and adapts to all documents
    before the present one.
    """
    compressed = lzma.compress(b"\n".join(documents), preset=9)
    return 8 * len(compressed) / sum(map(len, documents))
