"""Languages in thresholds: which are kept, how probable a document's must be, and for which languages a limit is meant."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import pyarrow as pa


#: Lowest and highest value that is kept, both inclusive; None is no limit.
Limit: TypeAlias = tuple[float | None, float | None]


@dataclass(frozen=True)
class Languages:
    """Which languages are kept, none named means every one, and the lowest probability at which a document is in its language.

    `lowest` holds the languages whose probability is another than the `usual` one; None is no limit.
    """

    kept: tuple[str, ...] = ()
    usual: float | None = None
    lowest: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.kept or self.lowest) or self.usual is not None


@dataclass(frozen=True)
class MeantFor:
    """The languages, as ISO 639 codes, for which a limit is meant: `only` some, or every one `but` some."""

    only: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is a language for which it is not meant."""
        return bool(self.only or self.but)

    def holds_for(self, languages: pa.Array) -> pa.Array:
        """Which documents, by their languages, it is for. A document of unknown language is judged by all limits."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self:
            return pa.repeat(pa.scalar(True), len(languages))
        named = pc.is_in(languages, pa.array(self.only or self.but, pa.string()))
        return pc.or_(pc.is_null(languages), named if self.only else pc.invert(named))


EVERY_LANGUAGE = MeantFor()

#: By language what FineWeb-2 publishes (Penedo et al. 2025; huggingface/fineweb-2, `configs/`, commit d0defb24), for the most
#: frequent script; and `fewest_words`, where the Universal Declaration of Human Rights has less than 0.8 of English's words, 50
#: times that share. The columns but for the first two are named after the scores.
_TABLE = Path(__file__).with_name("languages.csv")
#: FineWeb-2's tokenizers cut more words, of morphemes and compounds, than stand between spaces, so that the same marks are a
#: smaller share of theirs. With so much less, translations of paragraphs that the English limit keeps are kept
#: (`benchmarks/languages.py`, the paragraphs that it does not judge by).
WORDS_WITH_LETTER_SLACK = 0.06


def limits_by_language(
    limit: Limit, lowest: str | None = None, highest: str | None = None, slack: float = 0
) -> dict[str, Limit]:
    """The limit of each language whose own, by the columns of the table, is wider than `limit`, which is English's.

    A narrower one is not taken: it was found on other words than ours. slack: how much lower the lowest value is.
    """
    found: dict[str, Limit] = {}
    for language, row in _table().items():
        low, high = limit
        if lowest in row and low is not None:
            low = min(low, round(row[lowest] - slack, 3))
        if highest in row and high is not None:
            high = max(high, row[highest])
        if (low, high) != limit:
            found[language] = (low, high)
    return found


@cache
def _table() -> dict[str, dict[str, float]]:
    with _TABLE.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {row["language"]: {name: float(row[name]) for name in list(row)[2:] if row[name]} for row in rows}


#: Languages written without spaces between words, so that a "word" is a clause: Chinese with Wu and Cantonese, Japanese, Thai,
#: Lao, Khmer, Burmese, Tibetan, Dzongkha.
WITHOUT_SPACES = ("zh", "wuu", "yue", "ja", "th", "lo", "km", "my", "bo", "dz")
#: Of these, those that do not end a sentence with a mark.
WITHOUT_FULL_STOPS = ("th", "lo", "bo", "dz")

#: Lowest probability of the language to keep a text in it.
USUAL_LANGUAGE_SCORE = 0.65
#: The same where the usual one is wrong by much: for languages of which the model is never sure, and those that it takes others
#: for. Measured on Django's translations (docs/scores.md).
LANGUAGE_SCORES = {
    "af": 0.35,
    "ast": 0.35,
    "br": 0.35,
    "ca": 0.35,
    "cs": 0.8,
    "cy": 0.35,
    "da": 0.85,
    "eo": 0.85,
    "es": 0.85,
    "et": 0.35,
    "eu": 0.35,
    "ga": 0.35,
    "gd": 0.35,
    "gl": 0.35,
    "hi": 0.8,
    "ia": 0.35,
    "is": 0.35,
    "kk": 0.35,
    "ky": 0.35,
    "mn": 0.35,
    "ne": 0.35,
    "nl": 0.9,
    "nn": 0.35,
    "pl": 0.75,
    "ru": 0.9,
    "sk": 0.35,
    "sl": 0.45,
    "sr": 0.7,
    "sw": 0.35,
    "tg": 0.35,
    "tk": 0.35,
    "tr": 0.8,
    "uz": 0.4,
    "vi": 0.9,
}
