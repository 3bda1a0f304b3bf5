"""The folder of an evaluation: `settings.json`, `items.jsonl` with a line for each question, and `results.json`.

`items.jsonl` grows as questions are answered, so an evaluation that was stopped goes on from there. `results.json` is written
when all of them are, about the tasks that were asked last. `evaluation_folder.py` reads such a folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import check_format, read_json, write_json
from bessemer.evaluation.evaluation_folder import ITEMS_FILE, RESULTS_FILE

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
        """The whole lines; what a stop left behind the last line break is removed."""
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
