"""Data that stages make for later ones: its names in `data`, where it lies, and writing it row by row.

A name in `data` is a file or `made/…`. Long work writes each row when it is finished, so that a killed run resumes after the
last one. Imports neither PyTorch nor a reader of rows, since settings import this module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, SourceError
from bessemer.core.hashing import hash_value
from bessemer.core.records import TABLES, is_table
from bessemer.core.store import write_text
from bessemer.posttraining.data.hub import PREFIX, HubDataset, is_hub_dataset, looks_like_hub_dataset
from bessemer.posttraining.data.picture_rows import TAR

#: Revised answers, and conversations that a model wrote.
REVISIONS, SYNTHETIC = "made/revisions", "made/synthetic"
#: Conversations of an index, whose answers cite their sources.
CITED = "made/cited"
#: Questions of an index with the passages that answer them, and others.
QUESTIONS = "made/questions"
#: Pictures of pages and PDFs with their texts.
PICTURES = "made/pictures"
#: Data made from the run's own documents: its name in `data`.
DOCS_QUESTIONS = "made/docs_questions"
#: All data that a recipe makes and `sft` reads.
MADE_DATA = (DOCS_QUESTIONS, REVISIONS, SYNTHETIC, CITED, PICTURES)
#: Pairs that a model has judged; pairs of honest and dishonest answers; pairs made of the conversations of `sft`.
PREFERENCES, HONESTY, MISMATCHED = "made/preferences", "made/honesty", "made/mismatched"
#: Answers to forget and to keep, made of a corpus.
FORGETTING = "made/forgetting"

#: Prefix of the name of a task whose items are data.
TASK = "task/"
#: Treatment of an example that is longer than a row.
Truncate = Literal["drop", "left", "refuse"]
TRUNCATE = (
    "Of what is longer than a row, or of an answer of a pair than half a row. drop: left out; left: its beginning is cut off, "
    "and what the assistant says is learnt where it is whole; refuse: an error. How many there are is said. The end is never "
    "cut off, so that every answer teaches where it ends."
)

#: What becomes of rows that cannot be used.
OnBadRow = Literal["skip", "stop"]
ON_BAD_ROW = (
    "Rows that cannot be used, as an empty answer. skip: left out, counted and shown with their reasons, unless they are more "
    "than a twentieth of a file's rows; stop: an error."
)
#: Where rows may lie, for the description of `data`.
PLACES = "files of rows (JSON lines, JSON, CSV, XLSX, Parquet, also compressed), a folder/ of them, hub:ORGANISATION/NAME#SPLIT"

#: Name in `data` → kind of artefact, which is also the role of the input.
_KINDS: Mapping[str, str] = {
    REVISIONS: "revisions",
    SYNTHETIC: "synthetic",
    CITED: "cited",
    PICTURES: "pictures",
    QUESTIONS: "questions",
    PREFERENCES: "preferences",
    HONESTY: "honesty",
    MISMATCHED: "conversations",
    FORGETTING: "forgetting",
}


def roles(names: Iterable[str]) -> dict[str, str]:
    """Inputs of a stage whose `data` may have these names: role → kind of artefact."""
    return {_KINDS[name]: _KINDS[name] for name in names}


def unread(names: Iterable[str]) -> Callable[[Any], frozenset[str]]:
    """The roles of made data that these settings do not read, since their `data` does not name it."""
    every = frozenset(roles(names))
    return lambda config: every - {_KINDS[name] for name in config.data if name in _KINDS}


def made_paths(inputs: Mapping[str, Path]) -> dict[str, Path]:
    """Name in `data` → file or folder, for the data of the stages above."""
    return {name: inputs[kind] for name, kind in _KINDS.items() if kind in inputs}


def files_of(data: Iterable[str]) -> list[str]:
    """The names that are files."""
    return [name for name in data if name not in _KINDS]


def data_path(name: str, folder: Path, made: Mapping[str, Path]) -> Path | HubDataset:
    """Where the rows of a name of `data` lie: made, a file or folder relative to `folder`, or a data set of the hub. Raises
    SourceError for what no stage has made, ConfigError for a malformed name of the hub."""
    if is_hub_dataset(name):
        return HubDataset.parse(name)
    return made_path(name, made) if name in _KINDS or name in made else folder / name


def made_path(name: str, made: Mapping[str, Path]) -> Path:
    """The file of a name of made data. Raises SourceError for what no stage has made."""
    if name not in made:
        raise SourceError(f"{name} is made by a stage of a recipe; without one name its file")
    return made[name]


def data_name(given: str | Path) -> str:
    """The name in `data` for a user's input: the whole path of a file or a folder, or `hub:…`; ORGANISATION/NAME becomes
    `hub:…` where no file has that path."""
    name = str(given)
    if is_hub_dataset(name):
        return name
    path = Path(name)
    if path.is_dir():
        return f"{path.resolve()}/"
    if looks_like_hub_dataset(name) and not path.exists() and not path.parent.exists():
        return f"{PREFIX}{name}"
    return str(path.resolve())


def is_data_name(name: str) -> bool:
    """Whether a name can be one of rows: a table, a tar, a folder with a slash at its end, or a data set of the hub."""
    return is_table(name) or name.endswith(("/", TAR)) or is_hub_dataset(name)


#: Names of made pairs, the inputs of stages that learn from pairs, and those of them that settings leave unread.
MADE_PAIRS = (MISMATCHED, PREFERENCES, HONESTY)
PAIRS_NEEDS: Mapping[str, str] = {"model": "model", **roles(MADE_PAIRS)}
unread_pairs = unread(MADE_PAIRS)


def checked_pairs(names: list[str]) -> list[str]:
    """Names of files of pairs, and of made pairs. Raises ValueError for another."""
    for name in names:
        if name not in MADE_PAIRS and not is_data_name(name):
            raise ValueError(
                f"{name!r} is neither a file of rows ({', '.join(TABLES)}), a folder/ or hub:ORGANISATION/NAME, nor made "
                f"pairs{nearest(name, list(MADE_PAIRS))}"
            )
    return names


#: Key of the first line, which identifies what the rows were made from.
_IDENTITY = "rows_of"


class FinishedRows:
    """Finished rows in a JSONL file, in the order of the work. A row that a crash cut off is made again."""

    def __init__(self, path: Path, identity: Any) -> None:
        """Read the finished rows. identity: settings and data that the rows depend on, as a JSON value.

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
        """Drop the rows after the first `count`, for example those of an incomplete batch."""
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
    """Write a file of rows atomically."""
    write_text(path, "".join(_line(row) for row in rows))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The rows before the first incomplete one; none where the file is missing."""
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
