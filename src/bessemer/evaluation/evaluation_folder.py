"""The folder of an evaluation: `settings.json`, `items.jsonl` with a line for each question, and `results.json`.

`items.jsonl` has an object a line: `task`, `id` (the same item in every evaluation), `score` from 0 to 1 or null where there is
none, and optionally `cluster` (what an item shares with others, such as a passage), `prompt` and `answer`. It grows as
questions are answered, so a stopped evaluation resumes from it. `results.json` is written when all of them are answered.
`settings.json` says which model was evaluated (`model_identity`), wherever its files lie.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_bytes
from bessemer.core.store import check_format, read_json, write_json
from bessemer.model.storage.tuned_folder import TunedModel, tuned_model

ITEMS_FILE = "items.jsonl"
RESULTS_FILE = "results.json"


class Score(NamedTuple):
    """The score of an item, from 0 to 1, and the cluster that it belongs to; None where it is independent of the others."""

    score: float
    cluster: str | None


class ItemText(NamedTuple):
    """An item's prompt and a model's answer."""

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
            # a judgement that could not be read gives no score
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
    """Prompts and answers of some items, by task and id; empty where the file lacks them."""
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


#: Format number of `settings.json`.
SETTINGS_FORMAT = 1

SETTINGS_FILE = "settings.json"

#: Task and item, as in `items.jsonl`.
QuestionKey = tuple[str, str]


class TaskFolder:
    """An evaluation's folder, new or begun.

    model: what identifies the model. tasks: by name, what identifies each task; others may have been evaluated here before.
    Raises ConfigError where the folder holds answers of another model, or of a task with other settings.
    """

    def __init__(self, folder: Path, model: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder = folder
        known = self._read_settings()
        if known and known["model"] != model:
            raise ConfigError(f"{folder}: holds an evaluation of {_difference(known['model'], model)}; name another with --out")
        for name, settings in tasks.items():
            before = known["tasks"].get(name, settings) if known else settings
            if before != settings:
                difference = _difference(before["settings"], settings["settings"])
                raise ConfigError(f"{folder}: holds {name} with {difference}; name another with --out")
        folder.mkdir(parents=True, exist_ok=True)
        #: The lines of questions that are answered.
        self.done = self._read_items()
        merged = {**(known["tasks"] if known else {}), **tasks}
        write_json(folder / SETTINGS_FILE, {"format": SETTINGS_FORMAT, "model": model, "tasks": merged})

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the lines of questions that have been answered, each with its `task` and `id`."""
        (self.folder / RESULTS_FILE).unlink(missing_ok=True)
        with (self.folder / ITEMS_FILE).open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self.done.update({_key(line): line for line in lines})

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write `results.json`."""
        write_json(self.folder / RESULTS_FILE, results)

    def _read_settings(self) -> dict[str, Any] | None:
        path = self.folder / SETTINGS_FILE
        if not path.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise ConfigError(
                    f"{self.folder}: exists and holds something other than an evaluation; name another with --out"
                )
            return None
        settings: dict[str, Any] = read_json(path, "file of an evaluation's settings")
        check_format(settings.get("format"), SETTINGS_FORMAT, path, "file of an evaluation's settings")
        return settings

    def _read_items(self) -> dict[QuestionKey, Mapping[str, Any]]:
        """The lines of the file. What an interruption left after the last line break is removed."""
        path = self.folder / ITEMS_FILE
        if not path.exists():
            return {}
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            path.write_bytes(whole)
        try:
            lines = [json.loads(line) for line in whole.decode().split("\n") if line]
            return {_key(line): line for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{path}: these items are damaged ({error!r}); remove the folder, or name another") from None


def _key(line: Mapping[str, Any]) -> QuestionKey:
    return line["task"], line["id"]


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting that differs, for a message; other data where none does."""
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            return f"{key} {before.get(key)!r}, not {now.get(key)!r}"
    return "other items"


#: Bytes at each end of a file that are hashed.
_ENDS = 1 << 20
_FILES = ("*.safetensors", "*.gguf", "config.json", "tokenizer.json", "adapter_config.json")


def model_identity(place: Path, name: str, max_model_len: int | None = None, *, adapter: Path | None = None) -> dict[str, Any]:
    """The name of a model, a hash of its files, and the engine's setting that changes what it reads.

    place: a GGUF file, a model's folder, or a fine-tuning's. adapter: its folder. Of each file the size and both ends are
    hashed: trained weights differ there, and hundreds of gigabytes need not be read.
    """
    weights, own = tuned_model(place) or TunedModel(place, None)
    files = [weights] if weights.is_file() else _files(weights)
    adapter_folder = adapter or own
    files += [] if adapter_folder is None else _files(adapter_folder)
    parts = []
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as stream:
            beginning = stream.read(_ENDS)
            stream.seek(max(0, size - _ENDS))
            parts += [str(size).encode(), beginning, stream.read(_ENDS)]
    return {"name": name, "weights": hash_bytes(*parts), "max_model_len": max_model_len}


def _files(folder: Path) -> list[Path]:
    return sorted(path for pattern in _FILES for path in folder.glob(pattern))
