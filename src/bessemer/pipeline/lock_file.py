"""What was measured once and then kept: `minutes` turned into steps, `auto` into a choice.

`runs/NAME/recipe.lock.yaml` holds it for the user to read, keep and copy beside a recipe; the store holds a copy by
the hash of what was asked, so that a run under another name makes the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.core.store import read_json, write_json, write_text
from bessemer.core.yaml_file import dump_yaml, read_yaml

#: Format number of `recipe.lock.yaml`.
LOCK_FORMAT = 1


@dataclass(frozen=True)
class Resolved:
    """The settings of a stage after measuring, and the figures that decided them."""

    settings: dict[str, Any]
    measured: dict[str, Any]


class LockFile:
    """Resolved settings by stage, each bound to the hash of the settings and inputs that it was measured for."""

    def __init__(self, path: Path, store_root: Path) -> None:
        self._path = path
        self._store_root = store_root
        self._stages: dict[str, Any] = {}
        if path.exists():
            values = read_yaml(path).values
            if values.get("format") != LOCK_FORMAT or not isinstance(values.get("stages"), dict):
                raise ConfigError(f"{path}: not a lock file of format {LOCK_FORMAT}; delete it to measure again")
            self._stages = values["stages"]

    def find(self, stage: str, given: str) -> Resolved | None:
        """What was resolved for the settings and inputs of hash `given`, in this run or in another beside it."""
        entry = self._stages.get(stage)
        if not isinstance(entry, dict) or entry.get("given") != given:
            kept = self._store_root / f"resolved-{given}.json"
            if not kept.exists():
                return None
            entry = read_json(kept, "record of a measurement")
        return Resolved(entry["settings"], entry["measured"])

    def keep(self, stage: str, given: str, resolved: Resolved, *, replace: bool = False) -> None:
        """Write it to the store, where it stays as it is unless `replace`, and to the run's lock file."""
        entry = {"given": given, "settings": resolved.settings, "measured": resolved.measured}
        self._store_root.mkdir(parents=True, exist_ok=True)
        if replace or not (self._store_root / f"resolved-{given}.json").exists():
            write_json(self._store_root / f"resolved-{given}.json", entry)
        if self._stages.get(stage) != entry:
            self._stages[stage] = entry
            self._path.parent.mkdir(parents=True, exist_ok=True)
            note = "# Measured once on this machine; delete a stage's entry here and in the store to measure it again.\n"
            write_text(self._path, note + dump_yaml({"format": LOCK_FORMAT, "stages": self._stages}))
