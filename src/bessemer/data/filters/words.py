"""Scores `words`: counts of a user's own lists of words and patterns.

`words_scorer(path)` reads a list (`word_lists.reading` says in which form) and gives the scorer and its columns: for each
category the number of hits, weighted, and their share of the text's words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from bessemer.core.errors import ConfigError
from bessemer.data.filters.surface import surface
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.term_matcher import TermMatcher, term_matcher_of


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
