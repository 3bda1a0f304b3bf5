"""Prompts that are to be answered, with the answers that a file holds already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.posttraining.constitution.config import PrincipledConfig
from bessemer.posttraining.dataset import read_examples
from bessemer.posttraining.formats import Message, Turns, as_answered, as_pair, as_prompt

_USUAL_COLUMN = "prompt"
#: Columns of conversations, which would be read before a prompt.
_CONVERSATIONS = ("messages", "conversations")


@dataclass(frozen=True)
class Asked:
    """A conversation whose next turn is the assistant's, and what the data say to it: no, one or two answers."""

    prompt: tuple[Message, ...]
    answers: tuple[str, ...] = ()


def read_asked(config: PrincipledConfig, folder: Path) -> list[Asked]:
    """The prompts of all files that the settings name, in order. Raises SourceError or ArtefactError, with file and line."""
    rows = [row for name in config.data for row in read_examples(folder / name, partial(as_asked, config.prompt_column))]
    return rows[: config.limit]


def as_asked(column: str, row: Mapping[str, Any]) -> Asked:
    """A row of a prompt, of prompt and completion, or of a pair of answers. Raises ValueError or RequestError, in one line.

    column: where the prompt stands; of the usual one answers may do without, as a pair of whole conversations does.
    """
    if column in row or column != _USUAL_COLUMN:
        row = _with_prompt(row, column)
    if "chosen" in row and "rejected" in row:
        pair = as_pair(row)
        return Asked(as_prompt({"prompt": pair.prompt}), (_said(pair.chosen), _said(pair.rejected)))
    if "completion" in row:
        answered = as_answered(row)
        return Asked(as_prompt({"prompt": answered.prompt}), (_said(answered.answer),))
    return Asked(as_prompt(row))


def _with_prompt(row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """A row whose prompt is that of the column, whatever other columns hold one. Raises as `as_prompt`."""
    as_prompt(row, column)
    others = {name: value for name, value in row.items() if name not in (column, *_CONVERSATIONS)}
    return {**others, _USUAL_COLUMN: row[column]}


def _said(answer: Turns) -> str:
    """What an answer of one turn says."""
    if isinstance(answer, str):
        return answer
    if len(answer) != 1:
        raise ValueError("the answer is of several turns; one turn can be criticised")
    if answer[0].get("tool_calls"):
        raise ValueError("the answer calls tools; one turn of words can be criticised")
    return str(answer[0].get("content") or "")
