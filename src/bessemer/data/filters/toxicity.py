"""Scores `toxicity`: text that attacks people, and sexually explicit text, by words and phrases.

A text's score is r / (r + h): r is the weight of the hits in a hundred words, h what makes one half. So one insult in a
short comment weighs much and one in a novel little. A text of fewer than 40 words counts as 40.

Word lists know no context: they miss contempt in polite words and find quotations (docs/scores.md has the figures).
A classifier trained on examples of one's own (`classifier`) is the next step where that matters.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from bessemer.data.filters.surface import surface
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.term_matcher import TermMatcher, packaged_term_matcher

_ATTACKS = ("insults", "slurs", "hate", "threats")
_SHORTEST = 40
#: Weight in a hundred words that makes a score of one half.
_HALF_ATTACK = 1.4
_HALF_EXPLICIT = 1.6
#: However much a text swears, that alone attacks nobody.
_MOST_SWEARING = 1.1


def toxicity(texts: Texts, matcher: TermMatcher | None = None) -> dict[str, pa.Array]:
    """The scores of each text; `matcher` replaces our own lists by ones with the same categories."""
    matcher = matcher or packaged_term_matcher("toxicity")
    occurrences, _ = matcher.count(texts)
    of = {name: occurrences[:, number] for number, name in enumerate(matcher.names)}
    none = np.zeros(len(texts))
    attacks = sum((of.get(name, none) for name in _ATTACKS), none)
    per_hundred = 100.0 / np.maximum(surface(texts).words, _SHORTEST)
    swearing = np.minimum(of.get("profanity", none) * per_hundred, _MOST_SWEARING)
    attack = attacks * per_hundred + swearing
    return {
        "toxicity_score": pa.array(saturated(attack, _HALF_ATTACK)),
        "toxicity_nsfw": pa.array(saturated(of.get("nsfw", none) * per_hundred, _HALF_EXPLICIT)),
    }


def saturated(amount: np.ndarray, half: float) -> np.ndarray:
    """amount / (amount + half): 0 for nothing, one half for `half`, towards 1 for ever more."""
    return amount / (amount + half)
