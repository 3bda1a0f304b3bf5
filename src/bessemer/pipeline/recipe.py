"""A recipe: one YAML file that says what to make, checked whole before anything runs.

A key is a stage; an absent key is a stage skipped; `from` names the stage that feeds it, by default the nearest one
above that makes what it needs; `extends` inherits another recipe. Overrides `KEY=VALUE` come on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.core.errors import ConfigError
from bessemer.core.stage import Input, StageSpec
from bessemer.core.usercode import user_file
from bessemer.pipeline.stages import STAGES
from bessemer.pipeline.yaml_file import KeyPath, Place, PlacedValues, parse_value, read_yaml

#: The recipe format that this version reads.
RECIPE_FORMAT = 1


class LaunchConfig(Config):
    """`launch`: the processes of the stages that train. What they share is each stage's own `parallel`."""

    processes: Literal["auto"] | Annotated[int, Field(gt=0)] = setting(
        "auto", "Processes on this host. auto: one for each GPU, and one where there is none.", affects_output=False
    )
    nodes: int = setting(1, "Hosts; the same command is started on each.", affects_output=False, gt=0)
    rendezvous: str | None = setting(
        None, "HOST:PORT of the first of several hosts, where they find each other.", affects_output=False
    )
    restarts: int = setting(
        3,
        "How often the processes are started again after one died; they go on from the last checkpoint.",
        affects_output=False,
        ge=0,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.nodes > 1 and self.rendezvous is None:
            raise ValueError("nodes above 1 need rendezvous: HOST:PORT of the first of them")
        return self


class RecipeHead(Config):
    """The keys of a recipe that are not stages."""

    format: Literal[1] = setting(description="Format of the recipe file.")
    name: str = setting(description="Name of the run's folder.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = setting("", "One line that `bessemer recipes` shows.")
    seed: int = setting(0, "Every random choice of every stage derives from it.", ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "Where models run.", affects_output=False)
    launch: LaunchConfig = setting(
        description="Processes of the stages that train.", affects_output=False, default_factory=LaunchConfig
    )


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe, checked: its settings and what feeds it."""

    spec: StageSpec
    config: Config
    inputs: dict[str, Input]
    user_functions: tuple[str, ...]

    @property
    def name(self) -> str:
        """The recipe's key."""
        return self.spec.name


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Paths in it start from `folder`: its own, or the current one when the recipe is a shipped one."""

    head: RecipeHead
    stages: tuple[Stage, ...]
    values: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """Name of the run, unless `--name` gives another."""
        return self.head.name

    def stage(self, name: str) -> Stage:
        """The stage of this name. Raises ConfigError when the recipe has none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(
            f"the recipe {self.name!r} has no stage {name!r}{nearest(name, [stage.name for stage in self.stages])}"
        )


def shipped_recipes() -> dict[str, Path]:
    """The recipes that travel in the package, by name."""
    folder = Path(str(resources.files("bessemer.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe, given as a path or as a shipped name. Raises ConfigError when there is neither."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"{name}: there is no such recipe file")
        return Path(name)
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise ConfigError(f"there is no recipe {name!r}{nearest(name, list(shipped))} (a file ends in .yaml)")


def load_recipe(name: str, overrides: Sequence[str] | Mapping[str, Any] = (), *, allow_code: bool = False) -> Recipe:
    """Read, merge and check a recipe.

    `overrides`: `KEY=VALUE` strings, or dotted keys with values; `allow_code` lets a recipe that did not come with bessemer
    run functions of its own. Raises ConfigError, one line with file and line number.
    """
    path = find_recipe(name)
    placed = _with_extended(path, seen=())
    for key, value, source in _overrides(overrides):
        placed = _overridden(placed, key, value, source)
    shipped = path in shipped_recipes().values()
    folder = Path.cwd() if shipped else path.resolve().parent
    return _check(placed, folder, allow_code=allow_code or shipped)


def _with_extended(path: Path, seen: tuple[Path, ...]) -> PlacedValues:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: recipes extend each other in a circle")
    placed = read_yaml(path)
    parent = placed.values.pop("extends", None)
    if parent is None:
        return placed
    if not isinstance(parent, str):
        raise ConfigError(f"{placed.where(('extends',))}: must be a recipe's name or file")
    beside = path.parent / parent
    base = beside if parent.endswith((".yaml", ".yml")) and beside.is_file() else find_recipe(parent)
    merged = _with_extended(base, (*seen, path.resolve())).merged(placed)
    for stage in [key for key, value in placed.values.items() if value is None and key in STAGES]:
        del merged.values[stage]  # `sft:` with nothing behind it: without the other recipe's stage
    return merged


def _overrides(overrides: Sequence[str] | Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            yield key, value, f"override {key}"
        return
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{text!r}: an override is KEY=VALUE, as in pretrain.learning_rate=3e-3")
        yield key.strip(), parse_value(value, f"override {text}"), f"override {text}"


def _overridden(placed: PlacedValues, key: str, value: Any, source: str) -> PlacedValues:
    """One override on top; a number in the key picks an item of a list, and a value of null takes a key away."""
    parts: list[str] = key.split(".")
    known = [*RecipeHead.model_fields, *STAGES]
    if parts[0] not in known:
        raise ConfigError(f"{source}: unknown key {parts[0]!r}{nearest(parts[0], known)}")
    values = _copied(placed.values)
    container: Any = values
    path: KeyPath = ()
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        step = _step(container, part, path, source)
        path = (*path, step)
        if following is not None:
            if isinstance(container, dict):
                shorthand = STAGES[part].config.shorthand if len(path) == 1 and part in STAGES else None
                container[step] = _opened(container.get(step), shorthand, following)
            container = container[step]
        elif value is None and isinstance(container, dict):
            container.pop(step, None)
        else:
            container[step] = value
    places = {known: place for known, place in placed.places.items() if known[: len(path)] != path}
    return PlacedValues(values, {**places, path: Place(source)})


def _step(container: Any, part: str, path: KeyPath, source: str) -> str | int:
    """One part of an override's key as an index into what it reaches."""
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise ConfigError(f"{source}: {'.'.join(map(str, path))} is not a section, it has no {part!r}")
    if not part.isdecimal() or int(part) >= len(container):
        raise ConfigError(f"{source}: {'.'.join(map(str, path))} is a list of {len(container)}, it has no item {part!r}")
    return int(part)


def _opened(value: Any, shorthand: str | None, following: str) -> Any:
    """A value that an override's key goes on into: absent becomes an empty section, a section written short its long form."""
    if value is None:
        return {}
    if isinstance(value, dict) or (isinstance(value, list) and following.isdecimal()) or shorthand is None:
        return value
    return {shorthand: value}


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _check(placed: PlacedValues, folder: Path, *, allow_code: bool) -> Recipe:
    head_values = {key: value for key, value in placed.values.items() if key not in STAGES}
    for key in head_values:
        if key not in RecipeHead.model_fields:
            raise ConfigError(
                f"{placed.place((key,))}: unknown stage or key {key!r}{nearest(key, [*RecipeHead.model_fields, *STAGES])}"
            )
    head = RecipeHead.parse(head_values, lambda path: placed.where((), path))
    stages: list[Stage] = []
    for name, section in placed.values.items():
        if name in STAGES:
            stages.append(_check_stage(STAGES[name], section, placed, stages, folder, allow_code=allow_code))
    if not stages:
        raise ConfigError(f"{placed.place(())}: the recipe has no stage; known: {', '.join(STAGES)}")
    return Recipe(head, tuple(stages), placed.values, folder)


def _check_stage(
    spec: StageSpec, section: Any, placed: PlacedValues, above: list[Stage], folder: Path, *, allow_code: bool
) -> Stage:
    source = None
    if isinstance(section, dict):
        section = dict(section)
        source = section.pop("from", None)
        if source is not None and not isinstance(source, str):
            raise ConfigError(f"{placed.where((spec.name, 'from'))}: must be the name of a stage above")
    shorthand = spec.config.shorthand if not isinstance(section, (dict, type(None))) else None

    def where(path: KeyPath) -> str:
        return placed.where((spec.name,), path[1:] if shorthand and path[:1] == (shorthand,) else path)

    config = spec.config.parse(section, where)
    functions = tuple(config.user_functions())
    if not allow_code:
        refuse_code(config, placed.where((spec.name,)))
    for function in functions:
        user_file(function, folder)
    conflict = spec.conflict(config, {stage.name: stage.config for stage in above})
    if conflict is not None:
        raise ConfigError(f"{placed.where((spec.name,))}: {conflict}")
    inputs = spec.wire(config, [stage.spec for stage in above], source, lambda: placed.where((spec.name,)))
    return Stage(spec, config, inputs, functions)


def refuse_code(config: Config, where: str) -> None:
    """Raise ConfigError when settings name code of their own, which somebody else may have written."""
    if functions := config.user_functions():
        raise ConfigError(
            f"{where}: names code of its own ({functions[0]}); read it and what it imports, then say --allow-code (in Python, "
            "allow_code=True)"
        )
