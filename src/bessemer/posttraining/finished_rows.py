"""Rows that long work writes as they are finished, so that a killed run goes on behind the last of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_value
from bessemer.core.store import write_text

#: Key of the first line, which says what the rows are of.
_IDENTITY = "rows_of"


class FinishedRows:
    """Rows in a JSONL file, in the order of the work. What a crash cut in two is done again."""

    def __init__(self, path: Path, identity: Any) -> None:
        """Read what is finished. identity: settings and data that the rows depend on, as a JSON value.

        Raises ArtefactError where the rows of the file are of other settings or data.
        """
        self._path = path
        self._wanted = wanted = {_IDENTITY: hash_value(identity)}
        first, *rows = _whole_lines(path) or [wanted]
        if first != wanted:
            raise ArtefactError(f"{path}: its rows were made with other settings or data; remove it, or name another folder")
        self.rows: list[dict[str, Any]] = rows
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(_line(row) for row in (wanted, *rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, count: int) -> None:
        """Leave out the rows behind the first `count`, as of a lot that is not whole."""
        self.rows = self.rows[:count]
        write_text(self._path, "".join(_line(row) for row in (self._wanted, *self.rows)))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows down; they are on the disk when this returns."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write("".join(_line(row) for row in rows))
            stream.flush()
            os.fsync(stream.fileno())
        self.rows += [dict(row) for row in rows]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of rows that is whole or absent."""
    write_text(path, "".join(_line(row) for row in rows))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The rows up to the first that is not whole; none without a file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(row, dict):
            break
        rows.append(row)
    return rows
