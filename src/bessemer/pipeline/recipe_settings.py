"""Every setting of a recipe with where it comes from, as YAML: `bessemer recipes show NAME --full`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bessemer.core.config import Config
from bessemer.core.yaml_file import KeyPath, Place
from bessemer.model.config import ModelStageConfig
from bessemer.pipeline.recipe import Recipe, RecipeHead, Stage, shipped_recipes

#: Comments stand in one column up to this one; behind longer lines they follow at once.
_COMMENTS_AT = 72
#: Words that YAML reads as themselves.
_PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off)$)[A-Za-z_][\w./-]*", re.IGNORECASE | re.ASCII)


def recipe_settings(recipe: Recipe) -> Iterator[str]:
    """The lines of a recipe that says all that this one means, each setting with its place: a file's line, an override, the
    preset of a model, or the default."""
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
        # a section that is written short stands for one setting
        short = section is not None and not isinstance(section, Mapping) and name == config.shorthand
        origin = _origin(recipe, config, (stage.name, name), name in written or short)
        yield _line("  ", name, _plain(getattr(config, name)), origin)
    if existing is not None:
        yield f"  # all others are those of the model in {existing}"


def _origin(recipe: Recipe, config: Config, path: KeyPath, given: bool) -> str:
    if given:
        return _shown(recipe.placed.place(path))
    if path[-1] not in config.model_fields_set:
        return "default"
    preset = getattr(config, "preset", None)
    return f"preset {preset}" if preset else "follows from the others"


def _shown(place: Place) -> str:
    """A place as a reader looks for it: of a shipped recipe its name, not where it is installed."""
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
