"""Which scores a document needs to be kept: named presets of limits per score column."""

from __future__ import annotations

from collections.abc import Mapping

#: Lowest and highest score that is kept, both inclusive; None is no limit.
Limit = tuple[float | None, float | None]

#: Gopher's quality rules (Rae et al. 2021, section A.1.1), by the columns that `filters.gopher` writes.
GOPHER: dict[str, Limit] = {
    "gopher_words": (50, 100_000),
    "gopher_mean_word_length": (3, 10),
    "gopher_hashes_per_word": (None, 0.1),
    "gopher_ellipses_per_word": (None, 0.1),
    "gopher_bullet_lines": (None, 0.9),
    "gopher_ellipsis_lines": (None, 0.3),
    "gopher_words_with_letter": (0.8, None),
    "gopher_stop_words": (2, None),
}

PRESETS: Mapping[str, dict[str, Limit]] = {"gopher": GOPHER, "all": {}}
