"""Task files with their data, written for a test; scores without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bessemer.tasks.config import TaskOptions
from bessemer.tasks.questions import Task
from bessemer.tasks.registry import read_task

ANIMALS = [
    {"query": f"Which animal says {sound}?", "choices": ["cat", "dog", "cow"], "gold": gold}
    for gold, sound in enumerate(["miaow", "woof", "moo"])
]


def write_task(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "task", **settings: Any) -> Path:
    """A task file beside its data."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / f"{name}.yaml"
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in {"data": f"{name}.jsonl", **settings}.items()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def task_of(folder: Path, rows: Sequence[Mapping[str, Any]], options: TaskOptions | None = None, **settings: Any) -> Task:
    """The task of such a file."""
    return read_task(write_task(folder, rows, **settings), options)


@dataclass
class FakeScore:
    """A continuation's score by hand."""

    log_probs: Sequence[float]
    token_ids: Sequence[int] = field(default=())
    is_greedy: bool = False

    @property
    def total(self) -> float:
        return sum(self.log_probs)
