"""Term matcher: counts of hits by category for the terms and patterns of one or more lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.lib

from bessemer.core.errors import ConfigError
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.automaton import FoldedTerms
from bessemer.data.word_lists.reading import Category, packaged_list, read_list


class Hit(NamedTuple):
    """One term or pattern of a category, and how often a text has it."""

    category: str
    term: str
    times: int


class TermMatcher:
    """The terms and patterns of some categories, ready to be looked for in batches of texts."""

    def __init__(self, categories: Iterable[Category]) -> None:
        """Raises ConfigError for a term without letters or digits, or a pattern that RE2 does not accept."""
        self.categories: Mapping[str, Category] = {category.name: category for category in categories}
        self.names = tuple(self.categories)
        listed = [
            (number, term, weight)
            for number, category in enumerate(self.categories.values())
            for term, weight in category.terms.items()
        ]
        self._columns = np.array([number for number, _, _ in listed], np.int64)
        self._terms = [term for _, term, _ in listed]
        self._weights = np.array([weight for _, _, weight in listed], np.float64)
        try:
            self._automaton = FoldedTerms(self._terms) if listed else None
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for category in self.categories.values():
            for pattern in category.patterns:
                try:
                    pc.match_substring_regex(pyarrow.array([""]), pattern)
                except pyarrow.lib.ArrowInvalid as error:
                    raise ConfigError(f"category {category.name!r}: the pattern {pattern!r} is not RE2's ({error})") from None

    def count(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """What each text holds of each category, as weights: of every occurrence, and of each term once.

        Both (texts, categories) float64, in the order of `names`.
        """
        occurrences, distinct = self.count_terms(texts.data, texts.offsets)
        for number, category in enumerate(self.categories.values()):
            for pattern in category.patterns:
                found = np.asarray(pc.count_substring_regex(texts.array, pattern)).astype(np.float64)
                occurrences[:, number] += found * category.weight
                distinct[:, number] += (found > 0) * category.weight
        return occurrences, distinct

    def count_terms(self, data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `count`, of the terms alone, in spans of UTF-8 bytes that begin at `offsets`: lines, for example."""
        width = len(self.names)
        if self._automaton is None:
            return np.zeros((len(offsets) - 1, width)), np.zeros((len(offsets) - 1, width))
        return self._automaton.count(data, offsets, self._columns, self._weights, width)

    def hits(self, text: str) -> list[Hit]:
        """What of the lists one text has, by category in their order and then most frequent first."""
        texts, found = Texts.of([text]), []
        if self._automaton is not None:
            each = np.arange(len(self._terms))
            counts, _ = self._automaton.count(texts.data, texts.offsets, each, np.ones(len(each)), len(each))
            found = [Hit(self.names[self._columns[n]], self._terms[n], int(counts[0, n])) for n in np.flatnonzero(counts[0])]
        for category in self.categories.values():
            for pattern in category.patterns:
                if times := pc.count_substring_regex(texts.array, pattern)[0].as_py():
                    found.append(Hit(category.name, pattern, times))
        return sorted(found, key=lambda hit: (self.names.index(hit.category), -hit.times, hit.term))


@cache
def packaged_term_matcher(name: str) -> TermMatcher:
    """The matcher of a list that travels with Bessemer."""
    return TermMatcher(read_list(packaged_list(name)).values())


def term_matcher_of(path: Path) -> TermMatcher:
    """The matcher of a user's own list. Raises ConfigError when it cannot be read."""
    return TermMatcher(read_list(path).values())
