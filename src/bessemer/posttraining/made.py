"""Data that stages of a recipe make for later ones: their names in `data`, and where they lie. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bessemer.core.config import nearest
from bessemer.core.errors import SourceError
from bessemer.core.records import TABLES, is_table
from bessemer.core.stage import Outside

#: Revised answers, and conversations that a model wrote.
REVISIONS, SYNTHETIC = "made/revisions", "made/synthetic"
#: Pairs that a model has judged; pairs of honest and dishonest answers; pairs made of the conversations of `sft`.
PREFERENCES, HONESTY, MISMATCHED = "made/preferences", "made/honesty", "made/mismatched"

#: Name in `data` → kind of artefact, which is also the role of the stage that reads it.
_KINDS: Mapping[str, str] = {
    REVISIONS: "revisions",
    SYNTHETIC: "synthetic",
    PREFERENCES: "preferences",
    HONESTY: "honesty",
    MISMATCHED: "conversations",
}


def roles(names: Iterable[str]) -> dict[str, str]:
    """What a stage needs that may name these in its `data`: role → kind of artefact."""
    return {_KINDS[name]: _KINDS[name] for name in names}


def unread(names: Iterable[str]) -> Callable[[Any], frozenset[str]]:
    """The roles of these names that settings do not read, since their `data` does not name them."""
    every = frozenset(roles(names))
    return lambda config: every - {_KINDS[name] for name in config.data if name in _KINDS}


def made_paths(inputs: Mapping[str, Path]) -> dict[str, Path]:
    """Name in `data` → file or folder, of what the stages above have made."""
    return {name: inputs[kind] for name, kind in _KINDS.items() if kind in inputs}


def files_of(data: Iterable[str]) -> list[str]:
    """The names that are files."""
    return [name for name in data if name not in _KINDS]


def data_path(name: str, folder: Path, made: Mapping[str, Path]) -> Path:
    """The file of a name of `data`: made, or relative to `folder`. Raises SourceError for what no stage has made."""
    if name in _KINDS and name not in made:
        raise SourceError(f"{name} is made by a stage of a recipe; without one name its file")
    return made.get(name, folder / name)


#: Names of made pairs, the inputs of stages that learn from pairs, and which of them settings do not read.
MADE_PAIRS = (MISMATCHED, PREFERENCES, HONESTY)
PAIRS_NEEDS: Mapping[str, str] = {"model": "model", **roles(MADE_PAIRS)}
unread_pairs = unread(MADE_PAIRS)


def checked_pairs(names: list[str]) -> list[str]:
    """Names of files of pairs, and of made pairs. Raises ValueError for another."""
    for name in names:
        if name not in MADE_PAIRS and not is_table(name):
            raise ValueError(
                f"{name!r} is neither a file of rows ({', '.join(TABLES)}) nor made pairs{nearest(name, list(MADE_PAIRS))}"
            )
    return names


def pairs_fingerprint(config: Any, outside: Outside) -> dict[str, str]:
    """Hashes of the files that the settings name under `data`, for a stage's key."""
    from bessemer.posttraining.dataset import files_fingerprint

    return files_fingerprint(files_of(config.data), outside.folder)
