"""Connected components by union-find, in which every component is named after its smallest member."""

from __future__ import annotations

import numpy as np

from bessemer.data.text.compiled import compiled, compiled_allocating


class Components:
    """Over the numbers 0 to N - 1, each alone at first. 4 bytes a number up to 2^31, 8 above."""

    def __init__(self, size: int) -> None:
        self._parents = np.arange(size, dtype=np.int32 if size < 2**31 else np.int64)

    def unite(self, left: np.ndarray, right: np.ndarray) -> None:
        """Join the components of each pair, (P,) integers each."""
        _unite(self._parents, left, right)

    def smallest(self, numbers: np.ndarray) -> np.ndarray:
        """The smallest member of each number's component."""
        return _roots(self._parents, numbers)

    def others(self) -> np.ndarray:
        """All numbers that are not the smallest of their component, sorted."""
        return np.flatnonzero(self._parents != np.arange(len(self._parents)))


@compiled
def _root(parents: np.ndarray, number: int) -> int:
    while parents[number] != number:
        # halves the path for the next search
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number


@compiled
def _unite(parents: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    for index in range(len(left)):
        one, other = _root(parents, left[index]), _root(parents, right[index])
        if one < other:
            parents[other] = one
        else:
            parents[one] = other


@compiled_allocating
def _roots(parents: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    found = np.empty(len(numbers), dtype=np.int64)
    for index in range(len(numbers)):
        found[index] = _root(parents, numbers[index])
    return found
