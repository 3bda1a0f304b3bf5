"""Score `spam`: text written to sell, to lure or to be found by search engines.

A logistic function of five measures: spam phrases (`word_lists/spam.yaml`) that occur, and their share of the text; links,
shouting and currency marks. Its coefficients were fitted by logistic regression on half of the
documents in `benchmarks/marks`; docs/scores.md has precision and recall on the other half.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from bessemer.data.filters.measures import rounded
from bessemer.data.filters.surface import surface
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.term_matcher import TermMatcher, packaged_term_matcher

FEATURES = ("phrases", "phrase_density", "links", "shouting", "currency")
_COEFFICIENTS = np.array([1.65, 2.4, 0.25, 0.4, 0.15])
_INTERCEPT = -4.0
_SHORTEST = 30


def spam(texts: Texts, matcher: TermMatcher | None = None) -> dict[str, pa.Array]:
    """The score of each text; `matcher` replaces our own phrases, whatever its categories."""
    logits = spam_features(texts, matcher) @ _COEFFICIENTS + _INTERCEPT
    return {"spam_score": rounded(1 / (1 + np.exp(-logits)))}


def spam_features(texts: Texts, matcher: TermMatcher | None = None) -> np.ndarray:
    """The measures of each text, (N, `FEATURES`) float64, each a logarithm so that more of the same adds less."""
    occurrences, distinct = (matcher or packaged_term_matcher("spam")).count(texts)
    seen = surface(texts)
    per_hundred = 100.0 / np.maximum(seen.words, _SHORTEST)
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
