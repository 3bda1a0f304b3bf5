"""Spans of texts: words, lines, paragraphs, sentences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Spans:
    """K spans of N texts, in order.

    Span k is `data[starts[k]:ends[k]]` of `Texts.data`, and `characters[k]` characters long; text n has the spans
    `of_text[n]` to `of_text[n + 1]`. starts, ends (K,) int64, of_text (N + 1,) int64, characters (K,) int32.
    """

    starts: np.ndarray
    ends: np.ndarray
    of_text: np.ndarray
    characters: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def counts(self) -> np.ndarray:
        """How many spans each text has, (N,) int64."""
        return np.diff(self.of_text)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sums by text, (N,) int64, of a number or a truth for each span."""
        sums = np.zeros(len(self) + 1, np.int64)
        np.cumsum(values, out=sums[1:])
        return sums[self.of_text[1:]] - sums[self.of_text[:-1]]
