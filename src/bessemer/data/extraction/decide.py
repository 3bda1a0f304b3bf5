"""Choice of blocks: by the probabilities of the model, with a fallback where they leave next to nothing."""

from __future__ import annotations

import numpy as np

from bessemer.data.extraction.block_counts import CHARACTERS, CLOSED, HASH, LINK_CHARACTERS
from bessemer.data.extraction.feature_columns import FEATURES
from bessemer.data.extraction.parsing import Page
from bessemer.data.extraction.render import laid_out, table_of_blocks
from bessemer.data.extraction.tags import HEADING, NUMBER, TRAITS

#: With fewer characters the model's choice is not trusted when the page holds more.
_TOO_SHORT = 100
_H1 = NUMBER["h1"]
_CANDIDATE = FEATURES.index("candidate_in")
_TITLE_SHARE = FEATURES.index("title_share")


def _without_lone_headings(keep: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Drops a kept heading whose own text was not kept: the next block is gone, and the next one kept is a heading of its
    rank or above, or there is none. `levels`, (B,): 1 to 7, and 9 for what is no heading.
    """
    kept = keep.copy()
    # the level of the next block that is kept
    following = 0
    for block in np.flatnonzero(keep)[::-1].tolist():
        alone = following <= levels[block] < 9 and not (block + 1 < len(keep) and keep[block + 1])
        if alone and (levels[block] > 1 or following == 0):
            kept[block] = False
        else:
            following = int(levels[block])
    return kept if kept.any() else keep


def _whole_tables(answers: np.ndarray, sizes: np.ndarray, page: Page) -> np.ndarray:
    """The answers, with one for all cells of a table of data: their mean, long cells counting more."""
    layout = laid_out(page, np.ones(len(sizes), np.bool_), sizes)
    table = table_of_blocks(layout, page)
    inside = table >= 0
    if not inside.any():
        return answers
    _, which = np.unique(table[inside], return_inverse=True)
    weights = np.minimum(sizes[inside], 100) + 5.0
    means = np.bincount(which, answers[inside] * weights) / np.bincount(which, weights)
    answers = answers.copy()
    answers[inside] = means[which]
    return answers


def decide(answers: np.ndarray, rows: np.ndarray, counts: np.ndarray, page: Page, threshold: float) -> np.ndarray:
    """Which blocks belong to the text, (B,) bool, given the model's `answers`, the `FEATURES` and the `COUNTS`."""
    sizes = counts[:, CHARACTERS]
    links = counts[:, LINK_CHARACTERS]
    tags = page.tags[page.block_elements]
    answers = _whole_tables(answers, sizes, page)
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
    # "Further reading:" is a heading by its looks
    label = (sizes < 60) & (counts[:, CLOSED] == 1)
    keep = _without_lone_headings(keep, np.where(headings, tags - _H1 + 1, np.where(label, 7, 9)))
    return _one_title(keep, headings, rows, counts)


def _one_title(keep: np.ndarray, headings: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Drops a heading that says again what an earlier kept heading said, where it says the title."""
    titles = np.flatnonzero(keep & headings & (rows[:, _TITLE_SHARE] > 0.6))
    seen: set[int] = set()
    for block in titles:
        text = int(counts[block, HASH])
        if text in seen:
            keep[block] = False
        seen.add(text)
    return keep
