"""The longest runs of words that a text shares with others, found by reading these: nothing is indexed.

A text's windows of a fixed number of words are searched for in one pass. Where one stands, the words after it are taken
too, as far as they follow there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from bessemer.data.corpus.reader import count_documents, iterate_documents

_ROWS = 1024


class SharedSpan(NamedTuple):
    """The characters start … end of the text, which stand at `place` of another."""

    start: int
    end: int
    place: int


@dataclass(frozen=True)
class SpanPlace:
    """A document that holds a span: its row, without the text, and what stands around it there."""

    span: SharedSpan
    row: dict[str, Any]
    left: str
    right: str


class SpanFinder:
    """Finds the runs of at least `words` words of a text in others. Words are what blanks separate; the blanks count."""

    def __init__(self, text: str, words: int = 4) -> None:
        self.text = text
        self._words = [match.span() for match in re.finditer(r"\S+", text)]
        self._count = words
        self._windows = [
            text[self._words[first][0] : self._words[first + words - 1][1]] for first in range(len(self._words) - words + 1)
        ]

    @property
    def pattern(self) -> str | None:
        """A regular expression that matches in every text with a span; None where the text has too few words."""
        return "|".join(sorted({re.escape(window) for window in self._windows})) or None

    def spans(self, other: str) -> list[SharedSpan]:
        """The spans that another text holds, in the text's order, none within another."""
        found: list[SharedSpan] = []
        reached = 0
        for first, window in enumerate(self._windows):
            last = first + self._count
            if last <= reached or (place := other.find(window)) < 0:
                continue
            start = self._words[first][0]
            best = SharedSpan(start, self._words[last - 1][1], place)
            while place >= 0:
                end = last
                while end < len(self._words) and other.startswith(self.text[start : self._words[end][1]], place):
                    end += 1
                if self._words[end - 1][1] > best.end:
                    best, reached = SharedSpan(start, self._words[end - 1][1], place), end
                place = other.find(window, place + 1)
            reached = max(reached, last)
            found.append(best)
        return found


def document_spans(
    folder: Path, finder: SpanFinder, *, split: str | None = None, around: int = 100, seconds: float = 3.0
) -> tuple[list[SpanPlace], int, int]:
    """Where the spans of a text stand in a folder's documents; how many documents were looked at until the time had come, and
    how many there are. Raises ArtefactError for a folder that is none."""
    until, looked_at = time.monotonic() + seconds, 0
    places: list[SpanPlace] = []
    pattern = finder.pattern
    if pattern is None:
        return [], 0, count_documents(folder, split)
    for batch in iterate_documents(folder, split=split, batch_rows=_ROWS):
        looked_at += batch.num_rows
        for row in batch.filter(pc.match_substring_regex(batch.column("text"), pattern)).to_pylist():
            text = row.pop("text")
            places += [SpanPlace(span, row, *_beside(text, span, around)) for span in finder.spans(text)]
        if time.monotonic() > until:
            break
    return places, looked_at, count_documents(folder, split)


def _beside(text: str, span: SharedSpan, around: int) -> tuple[str, str]:
    end = span.place + span.end - span.start
    return text[max(0, span.place - around) : span.place], text[end : end + around]


def longest_apart(spans: Sequence[SharedSpan]) -> Iterator[tuple[int, int]]:
    """The longest of the spans, start … end, then the longest that does not overlap it, and so on; in the text's order."""
    taken: list[tuple[int, int]] = []
    for start, end in sorted({(span.start, span.end) for span in spans}, key=lambda span: (span[0] - span[1], span[0])):
        if all(end <= other_start or start >= other_end for other_start, other_end in taken):
            taken.append((start, end))
    yield from sorted(taken)
