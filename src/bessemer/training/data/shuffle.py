"""Shuffling without a stored order: a Feistel permutation with cycle walking.

The order of training data must be a pure function of (seed, step), the same on any number of ranks, and a shuffled
list of 1e12 positions does not fit in memory. A Feistel network turns any keyed hash into a permutation of a power of
two; cycle walking restricts it to any size (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method 3).
"""

from __future__ import annotations

import numpy as np

from bessemer.core.seeds import derive_seed

_ROUNDS = 6


def permuted(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The images of `positions` under a pseudorandom permutation of range(`size`), chosen by `seed`.

    positions: integers in [0, size), any shape. Returns int64 of the same shape; distinct positions stay distinct.
    """
    assert size >= 1 and (positions.size == 0 or (positions.min() >= 0 and positions.max() < size))
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [np.uint64(derive_seed(seed, "feistel", number)) for number in range(_ROUNDS)]
    values = _feistel(positions.astype(np.uint64), half_bits, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, keys: list[np.uint64]) -> np.ndarray:
    """The Feistel network on numbers of 2 × half_bits bits."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << shift) | right


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
