"""Which columns of a table are questions and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.config import nearest
from bessemer.core.errors import SourceError
from bessemer.core.records import read_records
from bessemer.data.sources.suffixes import READ_BY
from bessemer.posttraining.formats import ANSWERS, CONTINUE, PROMPTS, is_plain_text

#: Suffixes of files that hold texts, and no questions with answers.
_TEXT_FILES = {".docx", ".odt", ".rtf"}
_TEXT_FILES |= {suffix for suffix, source in READ_BY.items() if source not in ("tables", "code") and suffix != ".jsonl"}


def find_columns(path: Path, prompt: str | None, answer: str | None) -> tuple[str, str] | None:
    """The columns of questions and of answers of a file: those that are named, or the ones that can be told by their names;
    None for rows that are conversations in a format of their own.

    Raises SourceError where they cannot be told, or there are none of the names given, and for a folder or a file of texts;
    ArtefactError as `read_records`.
    """
    if path.is_dir() or path.suffix.lower() in _TEXT_FILES:
        what = "a folder" if path.is_dir() else "a file of text"
        raise SourceError(f"{path}: is {what}, and finetune learns answers from a table of questions and answers; {CONTINUE}")
    row = read_records(path)[0].values
    for option, name in (("--prompt-column", prompt), ("--answer-column", answer)):
        if name is not None and name not in row:
            raise SourceError(f"{path}: {option}: there is no column {name!r}{nearest(name, list(row))}")
    if prompt is None and answer is None and _is_conversation(row):
        return None
    if prompt is None and answer is None and is_plain_text(row):
        raise SourceError(
            f"{path}: no name of its columns ({', '.join(map(repr, row))}) tells of questions and answers; {CONTINUE}; or name "
            "the two columns with --prompt-column and --answer-column"
        )
    found = prompt or _only(path, row, PROMPTS, "--prompt-column"), answer or _only(path, row, ANSWERS, "--answer-column")
    if found[0] == found[1]:
        raise SourceError(f"{path}: the column {found[0]!r} cannot be question and answer both")
    return found


def _is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether `formats.as_answered` makes a conversation of a row, and not a text without roles."""
    if "messages" in row or "conversations" in row or isinstance(row.get("prompt"), list):
        return True
    return "instruction" in row and ("output" in row or "response" in row) and "completion" not in row


def _only(path: Path, row: Mapping[str, Any], names: Sequence[str], option: str) -> str:
    """The one column that has one of these names."""
    found = [column for column in row if str(column).strip().lower() in names]
    if len(found) == 1:
        return found[0]
    columns = ", ".join(map(repr, row))
    what = f"{' and '.join(map(repr, found))} could both be meant" if found else f"none of {columns} tells by its name"
    raise SourceError(f"{path}: {what}; name the column with {option}")
