"""Scores `hazards`: what a text has of each of MLCommons' hazard categories S1 to S14, by words and patterns.

The lists (`lists/hazards.yaml`) are those that the safety policy reads. A category's score is
1 − exp(−w · √(100 / max(words, 100))): w, the weight of its different hits, counts fully in a short text and in a longer one
less. Text that asks for harm or teaches it scores 0.6 and more, text that reports on it mostly less.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from bessemer.data.filters.measures import rounded
from bessemer.data.filters.surface import surface
from bessemer.data.text.texts import Texts
from bessemer.data.thresholds.score_limits import HAZARD_CATEGORIES
from bessemer.data.thresholds.score_limits import HAZARDS as HAZARDS
from bessemer.data.word_lists.term_matcher import TermMatcher, packaged_term_matcher

COLUMNS: dict[str, pa.DataType] = {f"hazards_{name}": pa.float64() for name in HAZARD_CATEGORIES}
MEANING = {
    "hazards_violent_crimes": "S1: help with or praise of violence (0 to 1)",
    "hazards_non_violent_crimes": "S2: help with theft, fraud, drugs, intrusion (0 to 1)",
    "hazards_sex_crimes": "S3: help with or praise of sexual violence (0 to 1)",
    "hazards_child_exploitation": "S4: sexual abuse of children (0 to 1)",
    "hazards_defamation": "S5: invented, damaging claims about real people (0 to 1)",
    "hazards_specialized_advice": "S6: dangerous medical, legal or financial advice (0 to 1)",
    "hazards_privacy": "S7: finding or exposing private information (0 to 1)",
    "hazards_intellectual_property": "S8: help with piracy (0 to 1)",
    "hazards_indiscriminate_weapons": "S9: weapons of mass destruction (0 to 1)",
    "hazards_hate": "S10: hatred of people for what they are (0 to 1)",
    "hazards_self_harm": "S11: suicide, self-harm, eating disorders (0 to 1)",
    "hazards_sexual_content": "S12: sexually explicit text (0 to 1)",
    "hazards_elections": "S13: false information on how to vote (0 to 1)",
    "hazards_code_interpreter_abuse": "S14: code that attacks the machine that runs it (0 to 1)",
}
_SHORTEST = 100


def hazards(texts: Texts, matcher: TermMatcher | None = None) -> dict[str, pa.Array]:
    """The score of each category for each text. Categories that `matcher` does not have score zero."""
    matcher = matcher or packaged_term_matcher("hazards")
    _, distinct = matcher.count(texts)
    diluted = 1 / np.sqrt(np.maximum(surface(texts).words, _SHORTEST) / _SHORTEST)
    scores = {name: 1 - np.exp(-distinct[:, number] * diluted) for number, name in enumerate(matcher.names)}
    none = np.zeros(len(texts))
    return {f"hazards_{name}": rounded(scores.get(name, none)) for name in HAZARD_CATEGORIES}
