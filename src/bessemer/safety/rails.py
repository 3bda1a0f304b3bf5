"""The guard's own rails: rules, word lists, and the classifier."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from bessemer.core.errors import ConfigError
from bessemer.core.policy import RULE_KINDS, Policy, SurfaceName
from bessemer.data.filters.registry import HAZARD_CATEGORIES
from bessemer.data.filters.word_list_scores import hazards
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.term_matcher import Category, TermMatcher
from bessemer.safety.classifier import GuardClassifier, load_guard_classifier, packaged_classifier
from bessemer.safety.config import GuardConfig
from bessemer.safety.findings import SURFACES, Finding
from bessemer.safety.normalise import Reading, cleaned
from bessemer.safety.rules import matches

#: Letters of scripts without blanks between words, where a term is looked for anywhere: Han, kana, Thai, Lao, Khmer, Burmese.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
#: Scores below this are not reported.
_LOWEST = 0.05


class RulesRail:
    """`rules.py`: each match is certain."""

    takes_long = False

    def __init__(self, policy: Policy) -> None:
        """Looks for those kinds alone about which the policy does anything at a surface."""
        self._kinds: dict[SurfaceName, list[str]] = {
            surface: [kind for kind in RULE_KINDS if policy.action(surface, kind) != "allow"] for surface in SURFACES
        }

    @property
    def categories(self) -> Collection[str]:
        return RULE_KINDS

    def check(self, text: str, found_readings: Sequence[Reading], surface: SurfaceName) -> list[Finding]:
        kinds = self._kinds[surface]
        if not kinds:
            return []
        return [
            Finding(match.kind, 1.0, "rules", match.rule, start=match.start, end=match.end)
            for match in matches(text, found_readings, kinds)
        ]


class WordsRail:
    """The score `hazards` of the refinery, and the terms and patterns of the policy's categories, a hit of which is certain."""

    takes_long = False

    def __init__(self, policy: Policy) -> None:
        """Raises ConfigError, naming the category, for a term without letters and a pattern that RE2 does not accept."""
        self._own: dict[str, TermMatcher] = {}
        for name, category in policy.categories.items():
            if category.terms or category.patterns:
                # readings are without accents
                forms = [form for term in category.terms for form in (term, cleaned(term))]
                unspaced = [re.escape(term) for term in forms if _UNSPACED.search(term)]
                terms = Category(
                    name,
                    terms={term: 1.0 for term in forms if not _UNSPACED.search(term)},
                    patterns=(*category.patterns, *dict.fromkeys(unspaced)),
                )
                try:
                    self._own[name] = TermMatcher([terms])
                except ConfigError as error:
                    raise ConfigError(f"the policy {policy.name!r}: category {name!r}: {error}") from None

    @property
    def categories(self) -> Collection[str]:
        return {*HAZARD_CATEGORIES, *self._own}

    def check(self, text: str, found_readings: Sequence[Reading], surface: SurfaceName) -> list[Finding]:
        texts = Texts.of([reading.text for reading in found_readings])
        found = []
        for column, scores in hazards(texts).items():
            row = int(np.argmax(scores))
            if (score := float(scores[row].as_py())) >= _LOWEST:
                name = column.removeprefix("hazards_")
                found.append(Finding(name, score, "words", f"score {column} {score:.2f}", found_readings[row].name))
        # and as it stands, for patterns with accents
        written = Reading("plain", unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode()))
        for name, matcher in self._own.items():
            for reading in (written, *found_readings):
                if hits := matcher.hits(reading.text):
                    found.append(Finding(name, 1.0, "words", f"term {hits[0].term!r}", reading.name))
                    break
        return found


class ClassifierRail:
    """The classifier of `classifier.py` on every reading."""

    takes_long = False

    def __init__(self, classifier: GuardClassifier) -> None:
        self.classifier = classifier

    @property
    def categories(self) -> Collection[str]:
        return self.classifier.categories

    def check(self, text: str, found_readings: Sequence[Reading], surface: SurfaceName) -> list[Finding]:
        scores_RK = np.array([self.classifier.scores(reading.text) for reading in found_readings])
        best_K = scores_RK.argmax(0)
        return [
            Finding(name, float(scores_RK[row, k]), "classifier", f"score {scores_RK[row, k]:.2f}", found_readings[row].name)
            for k, (name, row) in enumerate(zip(self.classifier.categories, best_K, strict=True))
            if scores_RK[row, k] >= _LOWEST
        ]


def rules_rail(policy: Policy, config: GuardConfig) -> RulesRail:
    """The rail `rules`."""
    return RulesRail(policy)


def words_rail(policy: Policy, config: GuardConfig) -> WordsRail:
    """The rail `words`."""
    return WordsRail(policy)


def classifier_rail(policy: Policy, config: GuardConfig) -> ClassifierRail:
    """The rail `classifier`. Raises ArtefactError for a file that is none."""
    if config.classifier is None:
        return ClassifierRail(packaged_classifier())
    return ClassifierRail(load_guard_classifier(Path(config.classifier)))
