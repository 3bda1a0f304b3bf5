"""Which blocks stay: the model's answers, and what to do where they leave next to nothing."""

from __future__ import annotations

import numpy as np

from bessemer.data.extraction.features import _CHARACTERS, _HASH, _LINK_CHARACTERS, FEATURES
from bessemer.data.extraction.parsing import Page
from bessemer.data.extraction.tags import HEADING, NUMBER, TRAITS

#: Below so many characters the model's choice is not trusted when the page holds more.
_TOO_SHORT = 100
_H1 = NUMBER["h1"]
_CANDIDATE = FEATURES.index("candidate_in")
_TITLE_SHARE = FEATURES.index("title_share")


def _without_lone_headings(keep: np.ndarray, headings: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Drops a kept heading that nothing kept follows before a heading of its own rank or above."""
    kept = keep.copy()
    next_level = 0  # of the next kept block that is a heading; 9 where it is text
    for block in np.flatnonzero(keep)[::-1].tolist():
        if not headings[block]:
            next_level = 9
        elif next_level == 0 or (next_level < 9 and next_level <= levels[block]):
            kept[block] = levels[block] == 1 and next_level != 0
            next_level = levels[block] if kept[block] else next_level
        else:
            next_level = levels[block]
    return kept


def decide(answers: np.ndarray, rows: np.ndarray, counts: np.ndarray, page: Page, threshold: float) -> np.ndarray:
    """Which blocks belong to the text, (B,) bool, given the model's `answers`, the `FEATURES` and the `COUNTS`."""
    sizes = counts[:, _CHARACTERS]
    links = counts[:, _LINK_CHARACTERS]
    tags = page.tags[page.block_elements]
    keep = answers >= threshold
    if sizes[keep].sum() < _TOO_SHORT:
        for wider in (
            answers >= threshold / 2,
            (rows[:, _CANDIDATE] > 0) & (2 * links < sizes),
            2 * links < sizes,
            np.ones(len(sizes), np.bool_),
        ):
            if sizes[wider].sum() >= 2 * max(1, sizes[keep].sum()):
                keep = keep | wider
            if sizes[keep].sum() >= _TOO_SHORT:
                break
    headings = (TRAITS[tags] & HEADING) != 0
    keep = _without_lone_headings(keep, headings, np.where(headings, tags - _H1 + 1, 0))
    return _one_title(keep, headings, rows, counts)


def _one_title(keep: np.ndarray, headings: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Drops a heading that says again what an earlier kept heading said, where it says the title."""
    titles = np.flatnonzero(keep & headings & (rows[:, _TITLE_SHARE] > 0.6))
    seen: set[int] = set()
    for block in titles:
        text = int(counts[block, _HASH])
        if text in seen:
            keep[block] = False
        seen.add(text)
    return keep
