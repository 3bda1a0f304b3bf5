"""Files of examples, read with a parser of rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bessemer.core.errors import BessemerError, RequestError, SourceError
from bessemer.core.hashing import hash_file, hash_value
from bessemer.core.records import Record, read_records
from bessemer.core.usercode import load_user_function
from bessemer.posttraining.formats import Turns

Example = TypeVar("Example")

#: Of many rows that cannot be used: how many are named besides the first.
_NAMED_ROWS = 5


def read_examples(path: Path, parse: Callable[[Mapping[str, Any]], Example]) -> list[Example]:
    """The rows of a file as examples. Raises SourceError with the file, the line of the first that is malformed, and the lines
    of others."""
    return [example for _, example in placed_examples(path, parse)]


def placed_examples(path: Path, parse: Callable[[Mapping[str, Any]], Example]) -> list[tuple[str, Example]]:
    """`read_examples`, each behind its file and line."""
    examples, bad = parsed(read_records(path), parse)
    if bad:
        raise SourceError(_bad_rows(bad))
    return examples


def examples_of_function(name: str, folder: Path, parse: Callable[[Mapping[str, Any]], Example]) -> list[tuple[str, Example]]:
    """The rows that a user's `file.py:function` gives, as examples, each behind its name and number.

    Raises ConfigError where there is no such function, SourceError for one that fails or gives none, and with the number of the
    first row that is malformed.
    """
    function = load_user_function(name, folder)
    try:
        rows = list(function())
    except BessemerError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise SourceError(f"{name}: it failed: {type(error).__name__}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise SourceError(f"{name}: row {number:,} must be a dict, it is {row!r}"[:200])
    if not rows:
        raise SourceError(f"{name}: it gives no row")
    records = [Record(dict(row), number, f"{name}: row {number:,}") for number, row in enumerate(rows, start=1)]
    examples, bad = parsed(records, parse)
    if bad:
        raise SourceError(f"{bad[0].record.place}: {bad[0].why}")
    return examples


class BadRow(NamedTuple):
    """A row that is no example. why: in one line, to stand behind the row's place."""

    record: Record
    why: str


def parsed(
    records: Iterable[Record], parse: Callable[[Mapping[str, Any]], Example]
) -> tuple[list[tuple[str, Example]], list[BadRow]]:
    """The rows as examples, each behind its place, and those that are none. parse: raises ValueError or RequestError for a
    malformed row."""
    examples, bad = [], []
    for record in records:
        try:
            examples.append((record.place, parse(record.values)))
        except (ValueError, RecursionError, RequestError) as error:
            bad.append(BadRow(record, str(error)))
    return examples, bad


def _bad_rows(bad: Sequence[BadRow]) -> str:
    """The first of some rows with its reason, where the others are, and what to do."""
    (first, why), *others = bad
    remedy = "mend the row, or take it out of the file"
    if not others:
        return f"{first.place}: {why}; {remedy}"
    shown = ", ".join(f"{record.number:,}" for record, _ in others[:_NAMED_ROWS])
    kind = "lines" if first.place.endswith(f":{first.number}") else "rows"
    more = ", …" if len(others) > _NAMED_ROWS else ""
    return f"{first.place}: {why}; {len(others):,} more cannot be used ({kind} {shown}{more}); {remedy}"


def prompt_key(prompt: Turns) -> str:
    """Hash of a prompt, by which examples of one prompt are kept together."""
    return hash_value(prompt if isinstance(prompt, str) else [dict(message) for message in prompt])


def drawn(examples: Sequence[Example], most: int, seed: int) -> Sequence[Example]:
    """At most `most` of the examples, drawn from all of them: the first would all be of the first file."""
    return examples if len(examples) <= most else random.Random(seed).sample(examples, most)


def files_fingerprint(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Hashes of files, for a stage's key. Raises SourceError for a missing one."""
    for name in names:
        if not (folder / name).is_file():
            raise SourceError(f"{folder / name}: there is no such file")
    return {name: hash_file(folder / name) for name in names}
