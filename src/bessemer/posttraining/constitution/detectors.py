"""Detectors of what an answer is: a refusal, a hazard by its words, babble. Quick, for English, and no judges of meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bessemer.core.policy import Policy, SurfaceName
from bessemer.data.filters.hazards import hazards
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.term_matcher import packaged_term_matcher

#: Characters of an answer within which a refusal is said: further on the words are about something else.
_BEGINNING = 160
#: Fewest words of an answer that is judged by how its words repeat.
_FEWEST_WORDS = 8
#: Share of different runs of three words, and of words with a letter or digit, below which an answer is babble.
_LEAST_DIFFERENT, _LEAST_READABLE = 0.5, 0.5
#: Characters of a word, an address apart, above which it is none.
_LONGEST_WORD = 60


@dataclass(frozen=True)
class Finding:
    """What detectors say of an answer. hazards: categories that the policy does not allow."""

    refuses: bool
    hazards: tuple[str, ...]
    babbles: bool

    @property
    def is_hazard(self) -> bool:
        """Whether it is of a category that the policy does not allow."""
        return bool(self.hazards)


def findings(texts: Sequence[str], policy: Policy, surface: SurfaceName = "answer") -> list[Finding]:
    """What detectors say of texts at a surface of a policy.

    Hazards are those of the score `hazards` (docs/scores.md), by the limits of the policy's categories of the same names.
    """
    whole = [_encodable(text) for text in texts]
    categories = policy.acted_on(surface)
    scores = {
        name: np.asarray(column)
        for name, column in ((key.removeprefix("hazards_"), value) for key, value in hazards(Texts.of(whole)).items())
        if name in categories
    }
    refusals, _ = packaged_term_matcher("refusals").count(Texts.of([text.strip()[:_BEGINNING] for text in whole]))
    return [
        Finding(
            refuses=bool(refusals[row].any()),
            hazards=tuple(name for name, values in scores.items() if values[row] >= categories[name].limit),
            babbles=babbles(text),
        )
        for row, text in enumerate(whole)
    ]


def babbles(text: str) -> bool:
    """Whether a text says nothing: without letters and digits, with words that are none, or the same over and over."""
    words = text.split()
    readable = [any(sign.isalnum() for sign in word) for word in words]
    if not any(readable) or any(len(word) > _LONGEST_WORD and "://" not in word for word in words):
        return True
    if len(words) < _FEWEST_WORDS:
        return False
    runs = [tuple(words[start : start + 3]) for start in range(len(words) - 2)]
    return len(set(runs)) < _LEAST_DIFFERENT * len(runs) or sum(readable) < _LEAST_READABLE * len(words)


def _encodable(text: str) -> str:
    """Without halves of surrogate pairs, which have no bytes."""
    return text.encode("utf-8", "replace").decode("utf-8")
