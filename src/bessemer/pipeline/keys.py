"""Identity of a stage: the key that names its folder, and the measured settings that are kept for it.

The key is a hash of everything that the output depends on. Settings such as `minutes` and `auto` are measured once:
`runs/NAME/recipe.lock.yaml` holds the result for the user to read, keep and copy beside a recipe, and the store holds a copy by
the hash of the settings as given, so that a run under another name makes the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.config import Config
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_value
from bessemer.core.registry import plugin_versions
from bessemer.core.stage import Outside
from bessemer.core.store import read_json, write_json, write_text
from bessemer.core.usercode import user_function_hash
from bessemer.core.yaml_file import dump_yaml, read_yaml
from bessemer.pipeline.recipe import Recipe, Stage
from bessemer.pipeline.stages import REGISTRY


def identity(recipe: Recipe, stage: Stage, config: Config, input_keys: Mapping[str, str], outside: Outside) -> dict[str, Any]:
    """Everything that a stage's output depends on, as JSON: code version, settings, inputs, seed, sources, user code.

    `input_keys`: role → key of the artefact that feeds it.
    """
    spec = stage.spec
    parts = {
        "stage": spec.kind,
        "version": spec.version,
        "settings": config.output_settings(),
        "inputs": {role: {"key": input_keys[role], "kind": source.kind} for role, source in stage.inputs.items()},
        "seed": recipe.head.seed if spec.uses_seed else None,
        "sources": spec.fingerprint(config, outside),
        "code": {name: user_function_hash(name, recipe.folder) for name in stage.user_functions},
    }
    # left out where there are none: a key that is empty would change the keys of all stages
    plugins = plugin_versions([*config.plugins(), (REGISTRY.group, spec.kind)])
    return {**parts, "plugins": plugins} if plugins else parts


def key_of(stage_identity: Mapping[str, Any]) -> str:
    """The folder's name: the stage's, for a person, and the hash."""
    return f"{stage_identity['stage']}-{hash_value(stage_identity)[:24]}"


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Why a stage is not the one made last time: the first changes between two identities, for a reader."""
    if before.get("version") != after["version"]:
        return f"its code changed (version {before.get('version')} → {after['version']})"
    changes = [
        f"{path} {_shortened(old)} → {_shortened(new)}"
        for path, old, new in _changed(before.get("settings", {}), after["settings"], "")
    ]
    if before.get("seed") != after["seed"]:
        changes.append(f"seed {before.get('seed')} → {after['seed']}")
    if before.get("code") != after["code"]:
        changes.append("your code in it changed")
    if before.get("sources") != after["sources"]:
        changes.append("its sources changed")
    if before.get("plugins") != after.get("plugins"):
        changes.append("a plugin of another package changed")
    if not changes and before.get("inputs") != after["inputs"]:
        stages = sorted(
            {
                made["key"].rpartition("-")[0]
                for role, made in after["inputs"].items()
                if before.get("inputs", {}).get(role) != made
            }
        )
        changes.append(f"what feeds it changed ({', '.join(stages)})")
    return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


def _changed(before: Any, after: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        names = [*before, *(name for name in after if name not in before)]
        return [
            change
            for name in names
            for change in _changed(before.get(name), after.get(name), f"{path}.{name}" if path else str(name))
        ]
    return [] if before == after else [(path, before, after)]


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"


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
        """The measured settings for settings and inputs of the hash `given`, from this run or another of the store."""
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
