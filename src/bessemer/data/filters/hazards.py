"""Scores `hazards`: MLCommons' hazard categories S1 to S14, by words and patterns.

The lists (`word_lists/hazards.yaml`) are those that the safety policy reads. A category's score is
1 − exp(−w · √(100 / max(words, 100))): w, the weight of its different hits, counts fully in a short text and in a longer one
less. Text that asks for harm or teaches it scores 0.6 and more, text that reports on it mostly less.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from bessemer.data.filters.measures import rounded
from bessemer.data.filters.registry import HAZARD_CATEGORIES
from bessemer.data.filters.surface import surface
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.term_matcher import TermMatcher, packaged_term_matcher

_SHORTEST = 100


def hazards(texts: Texts, matcher: TermMatcher | None = None) -> dict[str, pa.Array]:
    """The score of each category for each text. Categories that `matcher` does not have score zero."""
    matcher = matcher or packaged_term_matcher("hazards")
    _, distinct = matcher.count(texts)
    diluted = 1 / np.sqrt(np.maximum(surface(texts).words, _SHORTEST) / _SHORTEST)
    scores = {name: 1 - np.exp(-distinct[:, number] * diluted) for number, name in enumerate(matcher.names)}
    none = np.zeros(len(texts))
    return {f"hazards_{name}": rounded(scores.get(name, none)) for name in HAZARD_CATEGORIES}
