"""Search in rows of examples: which hold a sequence of words, and in what part of the row."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import BessemerError
from bessemer.data.corpus.shared_spans import SharedSpan, SpanFinder
from bessemer.posttraining.data.understanding import open_rows

#: Characters shown on either side of what was searched for.
_AROUND = 100
#: Rows between two looks at the clock.
_ROWS = 256


@dataclass(frozen=True)
class ExampleFile:
    """A file that a stage learnt from. kind: of the stage. is_split: whether it holds the training rows alone."""

    stage: str
    kind: str
    path: Path
    is_split: bool = False


@dataclass(frozen=True)
class ExamplePassage:
    """A place in a row. part: the key of the row that holds it, such as `chosen`. row: its number, that of its line where it
    has one. needle: which of the needles it is, by its number."""

    file: ExampleFile
    row: int
    part: str
    left: str
    found: str
    right: str
    needle: int


def example_passages(
    files: Sequence[ExampleFile], needles: Sequence[str], *, limit: int = 5, seconds: float = 3.0
) -> tuple[list[ExamplePassage], int]:
    """Rows that hold a text, those with the longest first, and how many rows were looked at until the time had come.

    needles: a text's endings, the longest first; every one ends in the last. A file that cannot be read is passed over.
    """
    until, looked_at = time.monotonic() + seconds, 0
    best: list[ExamplePassage] = []
    for file in files:
        for number, row in _rows(file.path):
            looked_at += 1
            passage = _passage(file, number, row, needles)
            if passage is not None and (len(best) < limit or passage.needle < best[-1].needle):
                best.append(passage)
                best.sort(key=lambda one: one.needle)
                del best[limit:]
            if looked_at % _ROWS == 0 and time.monotonic() > until:
                return best, looked_at
    return best, looked_at


def example_spans(
    files: Sequence[ExampleFile], finder: SpanFinder, *, seconds: float = 3.0
) -> tuple[list[tuple[SharedSpan, ExamplePassage]], int]:
    """Where the spans of a text stand in rows, and how many rows were looked at until the time had come. The passages' needle
    is 0."""
    until, looked_at = time.monotonic() + seconds, 0
    found: list[tuple[SharedSpan, ExamplePassage]] = []
    for file in files:
        for number, row in _rows(file.path):
            looked_at += 1
            for part, text in _texts(row):
                for span in finder.spans(text):
                    end = span.place + span.end - span.start
                    left, right = text[max(0, span.place - _AROUND) : span.place], text[end : end + _AROUND]
                    found.append((span, ExamplePassage(file, number, part, left, text[span.place : end], right, 0)))
            if looked_at % _ROWS == 0 and time.monotonic() > until:
                return found, looked_at
    return found, looked_at


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a file with their numbers. Lines of JSON are read one by one."""
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8", errors="replace") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        row = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(row, dict):
                        yield number, row
        else:
            for record in open_rows(path).records:
                yield record.number, record.values
    except (BessemerError, OSError):
        return


def _passage(file: ExampleFile, number: int, row: Mapping[str, Any], needles: Sequence[str]) -> ExamplePassage | None:
    """The best place in a row; of equally good ones the last, where the answers stand."""
    best: ExamplePassage | None = None
    for part, text in _texts(row):
        if needles[-1] not in text:
            continue
        needle = next(place for place, one in enumerate(needles) if one in text)
        if best is None or needle <= best.needle:
            start = text.index(needles[needle])
            end = start + len(needles[needle])
            left, right = text[max(0, start - _AROUND) : start], text[end : end + _AROUND]
            best = ExamplePassage(file, number, part, left, text[start:end], right, needle)
    return best


def _texts(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text of a row with the key that it stands below."""
    for key, value in row.items():
        waiting = [value]
        while waiting:
            one = waiting.pop(0)
            if isinstance(one, str):
                yield key, one
            elif isinstance(one, Mapping):
                waiting += one.values()
            elif isinstance(one, list | tuple):
                waiting += one
