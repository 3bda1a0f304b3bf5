"""Reader of an evaluation's folder: the score of every item, and the texts of chosen ones.

`items.jsonl` has an object a line: `task`, `id` (the same item in every evaluation), `score` from 0 to 1, or null where it
could not be found out, and perhaps `cluster` (what an item shares with others: a passage), `prompt` and `answer`.
`results.json` is written when all items are there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.core.errors import ArtefactError

ITEMS_FILE = "items.jsonl"
RESULTS_FILE = "results.json"


class Score(NamedTuple):
    """The score of an item, from 0 to 1, and the cluster that it belongs to; None where it is independent of the others."""

    score: float
    cluster: str | None


class ItemText(NamedTuple):
    """What a model was asked and what it answered."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Evaluation:
    """The scores of one evaluation: by task, by item."""

    name: str
    folder: Path
    tasks: Mapping[str, Mapping[str, Score]]


def is_evaluation(folder: Path) -> bool:
    """Whether a folder holds the items of an evaluation."""
    return (folder / ITEMS_FILE).is_file()


def read_evaluation(folder: Path, name: str | None = None) -> Evaluation:
    """The scores in a folder; `name` is what the evaluation is called, the folder's name unless given.

    Raises ArtefactError for an evaluation that is not finished, an empty one, and with its line an item that is damaged, that
    stands there twice, or whose score does not lie between 0 and 1.
    """
    path = folder / ITEMS_FILE
    if not (folder / RESULTS_FILE).is_file():
        raise ArtefactError(f"{folder}: this evaluation is not finished: it has no {RESULTS_FILE}; run it again, it goes on")
    tasks: dict[str, dict[str, Score]] = {}
    for number, record in _records(path):
        place = f"{path}, line {number}"
        task, item, score, cluster = (record.get(key) for key in ("task", "id", "score", "cluster"))
        if not isinstance(task, str) or not isinstance(item, str):
            raise ArtefactError(f"{place}: an item has a 'task' and an 'id', both texts")
        if "score" in record and score is None:
            # what could not be judged has no score
            continue
        if not isinstance(score, int | float) or not 0 <= score <= 1:
            raise ArtefactError(f"{place}: the 'score' of an item is a number from 0 to 1, not {score!r}")
        if cluster is not None and not isinstance(cluster, str):
            raise ArtefactError(f"{place}: the 'cluster' of an item is a text, not {cluster!r}")
        items = tasks.setdefault(task, {})
        if item in items:
            raise ArtefactError(f"{place}: the item {item!r} of {task} stands here a second time")
        items[item] = Score(float(score), cluster)
    if not tasks:
        raise ArtefactError(f"{path}: this evaluation has no items")
    return Evaluation(name or folder.name, folder, tasks)


def read_texts(evaluation: Evaluation, items: Collection[tuple[str, str]]) -> dict[tuple[str, str], ItemText]:
    """Prompts and answers of some items, by task and id; what the file does not tell is empty."""
    return {
        (record["task"], record["id"]): ItemText(str(record.get("prompt", "")), str(record.get("answer", "")))
        for _, record in _records(evaluation.folder / ITEMS_FILE)
        if (record["task"], record["id"]) in items
    }


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("not an object")
                    yield number, record
        except ValueError as error:
            raise ArtefactError(f"{path}, line {number}: this item is damaged ({error})") from None
