"""Settings of a recipe: all of them as YAML with their places; those of `clean` and `select` as a run recorded them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bessemer.core.config import Config
from bessemer.core.yaml_file import KeyPath, Location
from bessemer.data.config import CleanConfig, SelectConfig
from bessemer.model.config import ModelStageConfig
from bessemer.pipeline.recipe import Recipe, RecipeHead, Stage, refuse_code, shipped_recipes
from bessemer.pipeline.run_folder import RunFolder

#: Column of the comments; behind longer lines they follow directly.
_COMMENTS_AT = 72
#: Words that YAML reads as themselves.
_PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off)$)[A-Za-z_][\w./-]*", re.IGNORECASE | re.ASCII)


def recipe_settings(recipe: Recipe) -> Iterator[str]:
    """The lines of a recipe with every setting and its origin: a file's line, an override, a model's preset, or the default."""
    settings = recipe.head
    for name in RecipeHead.model_fields:
        yield _line("", name, _plain(getattr(settings, name)), _origin(recipe, settings, (name,), name in recipe.values))
    for stage in recipe.stages:
        yield ""
        reads = ", ".join(f"{source.kind} of {source.stage}" for source in stage.inputs.values())
        yield f"{stage.name}:{f'  # reads {reads}' if reads else ''}"
        yield from _stage_lines(recipe, stage)


def _stage_lines(recipe: Recipe, stage: Stage) -> Iterator[str]:
    section = recipe.values[stage.name]
    written = section if isinstance(section, Mapping) else {}
    for key in ("kind", "from"):
        if key in written:
            yield _line("  ", key, written[key], _origin(recipe, stage.config, (stage.name, key), given=True))
    config = stage.config
    existing = config.init_from if isinstance(config, ModelStageConfig) else None
    for name in type(config).model_fields:
        if existing is not None and name not in written:
            continue
        # a section may be the value of one setting, its shorthand
        short = section is not None and not isinstance(section, Mapping) and name == config.shorthand
        origin = _origin(recipe, config, (stage.name, name), name in written or short)
        yield _line("  ", name, _plain(getattr(config, name)), origin)
    if existing is not None:
        yield f"  # all others are those of the model in {existing}"


def _origin(recipe: Recipe, config: Config, path: KeyPath, given: bool) -> str:
    if given:
        return _readable(recipe.placed.place(path))
    if path[-1] not in config.model_fields_set:
        return "default"
    preset = getattr(config, "preset", None)
    return f"preset {preset}" if preset else "follows from the others"


def _readable(place: Location) -> str:
    """A place for a reader: a shipped recipe by its name, not by the path of the installation."""
    names = {str(path): name for name, path in shipped_recipes().items()}
    if place.source not in names:
        return str(place)
    return f"recipe {names[place.source]}" + (f", line {place.line}" if place.line else "")


def _line(indent: str, name: str, value: Any, origin: str) -> str:
    return f"{f'{indent}{name}: {_flow(value)}':<{_COMMENTS_AT}}  # {origin}"


def _plain(value: Any) -> Any:
    """A setting's value as JSON holds it."""
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _flow(value: Any) -> str:
    """A plain value in one line of YAML."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_flow(str(key))}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def recorded_cleaning(run: RunFolder, *, allow_code: bool = False) -> tuple[CleanConfig | None, SelectConfig | None, Path]:
    """The settings of the run's `clean` and `select`, None where it has none, and the folder that their paths start from.

    Raises ArtefactError for a folder that is no run's, ConfigError for settings that name code, without `allow_code`.
    """
    sections = {
        str(section.get("kind", name)) if isinstance(section, dict) else name: section
        for name, section in run.record()["recipe"].items()
    }
    clean = CleanConfig.parse(_own_settings(sections["clean"]), "clean") if "clean" in sections else None
    if clean is not None and not allow_code:
        refuse_code(clean, f"{run.folder / 'run.json'}: clean")
    select = SelectConfig.parse(_own_settings(sections["select"]), "select") if "select" in sections else None
    return clean, select, Path.cwd()


def _own_settings(section: Any) -> Any:
    """A stage's section without the keys that are not its settings."""
    if not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if key not in ("from", "kind")}
