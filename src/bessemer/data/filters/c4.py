"""Scores `c4`: C4's rules about whole documents (Raffel et al. 2020, section 2.2). Its rules about lines: `edits.c4_lines`."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.filters.measures import columns
from bessemer.data.text.texts import Texts


def c4(texts: Texts) -> dict[str, pa.Array]:
    """Counts in each text: sentences (`Texts.sentences`), occurrences of “lorem ipsum” in any case, and of `{`."""
    return columns(
        {
            "c4_lorem_ipsum": _occurrences(texts.array, "lorem ipsum"),
            "c4_curly_brackets": _occurrences(texts.array, "{"),
            "c4_sentences": texts.sentences.counts,
        }
    )


def _occurrences(array: pa.Array, pattern: str) -> np.ndarray:
    return pc.count_substring(array, pattern, ignore_case=True).to_numpy(zero_copy_only=False)
