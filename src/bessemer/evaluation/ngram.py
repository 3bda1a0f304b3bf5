"""Interpolated Witten–Bell n-gram model over bytes: the baseline that a trained model must beat by a margin.

    P_n(w | h) = (c(h, w) + T(h) · P_{n−1}(w | h')) / (c(h) + T(h))

h is the n−1 symbols before w, h' is h without its oldest, c counts in the training text, and T(h) is the number of
different symbols seen after h: the more often h was followed by something new, the more weight the shorter context
gets (Witten and Bell 1991; Chen and Goodman 1998, section 2.4). P_0 is uniform. An unseen h leaves P_{n−1} as it is.

The symbols are the 256 bytes and one that ends a document; contexts before a document's first byte are filled with
that one, so no document sees the one before it. It is counted in the bits and not in the bytes, as the model's end
token is in `training.validation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

END = 256
SYMBOLS = 257
_BITS = 9  # a symbol in a packed n-gram
LONGEST_ORDER = 64 // _BITS


def witten_bell_bits_per_byte(train: Sequence[bytes], validation: Sequence[bytes], orders: Iterable[int]) -> dict[int, float]:
    """Bits per byte of `validation` under models of these orders trained on `train`; a document is one item.

    The highest order passes through all lower ones, so several cost what the highest does: for 30 MB at order 6 about
    ten seconds and 1 GB. Raises ValueError for an order outside 1 … 7.
    """
    wanted = sorted(set(orders))
    size = sum(map(len, validation))
    found = {}
    for order, probabilities in enumerate(witten_bell(train, validation, wanted[-1]), start=1):
        if order in wanted:
            found[order] = float(-np.log2(probabilities).sum() / size)
    return found


def witten_bell(train: Sequence[bytes], validation: Sequence[bytes], order: int) -> Iterator[np.ndarray]:
    """The probability of each symbol of `validation` given those before it, under orders 1, 2, … `order` in turn.

    Yields float64 arrays of the same length: each document's bytes and its end, document after document.
    Raises ValueError for an order outside 1 … 7.
    """
    if not 1 <= order <= LONGEST_ORDER:
        raise ValueError(f"an n-gram of order {order} cannot be packed into 64 bits; use 1 to {LONGEST_ORDER}")
    train_symbols, validation_symbols = _Symbols(train, order), _Symbols(validation, order)
    probabilities = np.full(len(validation_symbols), 1 / SYMBOLS)
    for _ in range(order):
        ngrams, ngram_counts, _ = _runs(np.sort(train_symbols.longer_ngrams()))
        contexts, followers, first = _runs(ngrams >> _BITS)
        context_counts = np.add.reduceat(ngram_counts, first)

        queries = validation_symbols.longer_ngrams()
        positions = np.argsort(queries)  # looking up in order is several times faster: neighbours share memory
        queries, shorter = queries[positions], probabilities[positions]
        at_ngram, ngram_known = _find(ngrams, queries)
        at_context, context_known = _find(contexts, queries >> _BITS)
        count = np.where(ngram_known, ngram_counts[at_ngram], 0)
        context_count, follower_count = context_counts[at_context], followers[at_context]
        longer = (count + follower_count * shorter) / (context_count + follower_count)
        probabilities[positions] = np.where(context_known, longer, shorter)
        yield probabilities.copy()


class _Symbols:
    """Documents as one array of symbols, and the n-grams that end in each position to be predicted.

    An n-gram is packed into 64 bits with its newest symbol lowest, so a shift by one symbol gives its context, and
    sorting brings n-grams of one context together.
    """

    def __init__(self, documents: Sequence[bytes], order: int) -> None:
        padding = np.full(order - 1, END, np.uint16)
        end = np.array([END], np.uint16)
        pieces = [piece for text in documents for piece in (padding, np.frombuffer(text, np.uint8), end)]
        self._symbols = np.concatenate(pieces, dtype=np.uint16)
        self._predicted = np.ones(len(self._symbols), bool)
        starts = np.cumsum([0] + [len(text) + order for text in documents[:-1]])
        self._predicted[(starts[:, None] + np.arange(order - 1)).ravel()] = False
        self._ngrams = np.zeros(len(self._symbols), np.uint64)
        self._length = 0

    def __len__(self) -> int:
        return int(self._predicted.sum())

    def longer_ngrams(self) -> np.ndarray:
        """The n-grams one symbol longer than those of the last call; the first call gives single symbols."""
        older = self._symbols[: len(self._symbols) - self._length].astype(np.uint64)
        older <<= np.uint64(_BITS * self._length)
        self._ngrams[self._length :] |= older
        self._length += 1
        return self._ngrams[self._predicted]


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of values in order: the different ones, how often each occurs, and where each begins."""
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return ordered[first], np.diff(first, append=len(ordered)), first


def _find(keys: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each query stands in the sorted `keys`, and whether it does; where it does not, any valid place."""
    at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return at, keys[at] == queries
