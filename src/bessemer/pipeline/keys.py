"""The name of a stage's folder: a hash of everything that its output depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bessemer.core.config import Config
from bessemer.core.hashing import hash_value
from bessemer.core.registry import plugin_versions
from bessemer.core.stage import Outside
from bessemer.core.usercode import user_function_hash
from bessemer.pipeline.recipe import Recipe, Stage
from bessemer.pipeline.stages import REGISTRY


def identity(recipe: Recipe, stage: Stage, config: Config, input_keys: Mapping[str, str], outside: Outside) -> dict[str, Any]:
    """Everything that a stage's output depends on, as JSON: code version, settings, inputs, seed, sources, user code.

    `input_keys`: role → key of the artefact that feeds it.
    """
    spec = stage.spec
    found = {
        "stage": spec.kind,
        "version": spec.version,
        "settings": config.output_settings(),
        "inputs": {role: {"key": input_keys[role], "kind": source.kind} for role, source in stage.inputs.items()},
        "seed": recipe.head.seed if spec.uses_seed else None,
        "sources": spec.fingerprint(config, outside),
        "code": {name: user_function_hash(name, recipe.folder) for name in stage.user_functions},
    }
    # only where there are any, so that the keys of all other stages stay
    plugins = plugin_versions([*config.plugins(), (REGISTRY.group, spec.kind)])
    return {**found, "plugins": plugins} if plugins else found


def key_of(stage_identity: Mapping[str, Any]) -> str:
    """The folder's name: the stage's, for a person, and the hash."""
    return f"{stage_identity['stage']}-{hash_value(stage_identity)[:24]}"


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Why a stage is not the one made last time, in words: the first changes between two identities."""
    if before.get("version") != after["version"]:
        return f"its code changed (version {before.get('version')} → {after['version']})"
    changes = [
        f"{path} {_shown(old)} → {_shown(new)}"
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


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"
