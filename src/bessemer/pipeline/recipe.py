"""A recipe: one YAML file that says what to make, checked whole before anything runs.

A key is a stage; an absent key is a stage skipped. A stage of another name says its `kind`: `anneal: {kind: pretrain, …}`.
`from` names the stage that feeds it, or role by role the stages, by default the nearest one above that makes what it needs;
`extends` inherits another recipe. Overrides `KEY=VALUE` come on top.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.core.errors import ConfigError
from bessemer.core.stage import Input, StageSpec
from bessemer.core.usercode import user_file
from bessemer.core.yaml_file import KeyPath, Location, PlacedValues, parse_value, read_yaml
from bessemer.pipeline.stages import STAGES, example_of


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
    """One stage of a recipe, checked: its key in the recipe, its settings and what feeds it."""

    name: str
    spec: StageSpec
    config: Config
    inputs: dict[str, Input]
    user_functions: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Paths in it start from `folder`: its own, or the current one when the recipe is a shipped one.

    placed: what was written, with the place of each key.
    """

    head: RecipeHead
    stages: tuple[Stage, ...]
    placed: PlacedValues
    folder: Path

    @property
    def values(self) -> dict[str, Any]:
        """What was written, what it extends and overrides included."""
        return self.placed.values

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
            raise ConfigError(f"{name}: there is no such recipe file; check the path, or name one that bessemer recipes lists")
        return Path(name)
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise ConfigError(f"there is no recipe {name!r}{nearest(name, list(shipped))} (a file ends in .yaml)")


def load_recipe(name: str, overrides: Sequence[str] | Mapping[str, Any] = (), *, allow_code: bool = False) -> Recipe:
    """Read, merge and check a recipe.

    `overrides`: one `KEY=VALUE` or a list of them, or dotted keys with values; `allow_code` lets a recipe that did not come
    with bessemer run functions of its own. Raises ConfigError, one line with file and line number.
    """
    path = find_recipe(name)
    placed = _with_overrides(_with_extended(path, seen=()), list(_overrides(overrides)))
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
    neighbour = path.parent / parent
    base = neighbour if parent.endswith((".yaml", ".yml")) and neighbour.is_file() else find_recipe(parent)
    extended = _with_extended(base, (*seen, path.resolve()))
    inherited = set(extended.values)
    merged = _without_replaced(extended, placed.values).merged(placed)
    for stage in [key for key, value in placed.values.items() if value is None and key not in RecipeHead.model_fields]:
        # `sft:` without a value removes an inherited stage, and adds one that needs no settings
        if stage in STAGES or stage in inherited:
            del merged.values[stage]
    return merged


def _without_replaced(inherited: PlacedValues, given: Mapping[str, Any]) -> PlacedValues:
    """Inherited sections without the settings whose alternatives are given: `pretrain.steps` unsets `pretrain.minutes`.

    given: stage → the settings that come on top.
    """
    values, gone = dict(inherited.values), set[KeyPath]()
    for stage, section in given.items():
        below = values.get(stage)
        spec = _spec_of(stage, section) or _spec_of(stage, below)
        if spec is None or not isinstance(section, dict) or below is None:
            continue
        replaced = spec.config.replaced_by({name for name, value in section.items() if value is not None}) - section.keys()
        if not isinstance(below, dict):
            # a section may be the value of one setting, its shorthand
            if spec.config.shorthand in replaced:
                values[stage] = {}
            continue
        values[stage] = {name: value for name, value in below.items() if name not in replaced}
        gone.update((stage, name) for name in replaced)
    return PlacedValues(values, {path: place for path, place in inherited.places.items() if path[:2] not in gone})


def _with_overrides(placed: PlacedValues, overrides: Sequence[tuple[str, Any, str]]) -> PlacedValues:
    """A recipe with (key, value, source) on top of it."""
    given: dict[str, dict[str, Any]] = {}
    for key, value, _ in overrides:
        stage, _, setting_name = key.partition(".")
        given.setdefault(stage, {})[setting_name] = value
    placed = _without_replaced(placed, given)
    # `NAME.kind` comes first: the other overrides of a new stage need it
    for key, value, source in sorted(overrides, key=lambda override: not override[0].endswith(".kind")):
        placed = _overridden(placed, key, value, source)
    return placed


def _overrides(overrides: Sequence[str] | Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            yield key, value, f"override {key}"
        return
    for text in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{text!r}: an override is KEY=VALUE, as in pretrain.learning_rate=3e-3")
        yield key.strip(), parse_value(value, f"override {text}"), f"override {text}"


def _overridden(placed: PlacedValues, key: str, value: Any, source: str) -> PlacedValues:
    """A recipe with one override. A number in the key picks an item of a list; the value null removes a key."""
    parts: list[str] = key.split(".")
    spec = None if parts[0] in RecipeHead.model_fields else _spec_of(parts[0], placed.values.get(parts[0]))
    if spec is None and parts[0] not in RecipeHead.model_fields and not _names_kind(parts, value):
        known = [*RecipeHead.model_fields, *placed.values, *STAGES]
        raise ConfigError(f"{source}: unknown key {parts[0]!r}{nearest(parts[0], known)}")
    values = _copied(placed.values)
    container: Any = values
    path: KeyPath = ()
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        step = _step(container, part, path, source)
        path = (*path, step)
        if following is not None:
            if isinstance(container, dict):
                shorthand = spec.config.shorthand if len(path) == 1 and spec is not None else None
                container[step] = _opened(container.get(step), shorthand, following)
            container = container[step]
        elif value is None and isinstance(container, dict):
            container.pop(step, None)
        else:
            container[step] = value
    places = {known: place for known, place in placed.places.items() if known[: len(path)] != path}
    return PlacedValues(values, {**places, path: Location(source)})


def _names_kind(parts: list[str], value: Any) -> bool:
    """Whether an override begins a stage of a name of its own: `anneal.kind=pretrain`, `anneal={kind: pretrain}`."""
    return parts[1:] == ["kind"] or (len(parts) == 1 and isinstance(value, dict) and "kind" in value)


def _spec_of(name: str, section: Any) -> StageSpec | None:
    """The kind of stage that a key of a recipe means: its own name, or the `kind` in its section; None for no stage."""
    if name in STAGES:
        return STAGES[name]
    kind = section.get("kind") if isinstance(section, dict) else None
    return STAGES[kind] if isinstance(kind, str) and kind in STAGES else None


def _step(container: Any, part: str, path: KeyPath, source: str) -> str | int:
    """One part of an override's key as an index into its container."""
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise ConfigError(f"{source}: {'.'.join(map(str, path))} is not a section, it has no {part!r}")
    if not part.isdecimal() or int(part) >= len(container):
        raise ConfigError(f"{source}: {'.'.join(map(str, path))} is a list of {len(container)}, it has no item {part!r}")
    return int(part)


def _opened(value: Any, shorthand: str | None, following: str) -> Any:
    """The container that an override's key goes on into: an empty section for none, the long form of a shorthand."""
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
    specs = {key: _checked_spec(key, section, placed) for key, section in placed.values.items() if key not in _HEAD_KEYS}
    head_values = {key: value for key, value in placed.values.items() if key in _HEAD_KEYS}
    head = RecipeHead.parse(head_values, lambda path: placed.where((), path))
    stages: list[Stage] = []
    for name, spec in specs.items():
        stages.append(_check_stage(name, spec, placed, stages, folder, allow_code=allow_code))
    if not stages:
        raise ConfigError(f"{placed.place(())}: the recipe has no stage; known: {', '.join(STAGES)}")
    return Recipe(head, tuple(stages), placed, folder)


_HEAD_KEYS = frozenset(RecipeHead.model_fields)
#: Names of stages are names of folders, and keys of overrides.
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _checked_spec(name: str, section: Any, placed: PlacedValues) -> StageSpec:
    """The kind of stage that a key means. Raises ConfigError for a key that is neither a stage nor a key of the head."""
    kind = section.get("kind") if isinstance(section, dict) else None
    if kind is None:
        if name in STAGES:
            return STAGES[name]
        raise ConfigError(
            f"{placed.place((name,))}: unknown stage or key {name!r}{nearest(name, [*RecipeHead.model_fields, *STAGES])}"
        )
    if not isinstance(kind, str) or kind not in STAGES:
        raise ConfigError(
            f"{placed.where((name, 'kind'))}: there is no kind of stage {kind!r}{nearest(str(kind), list(STAGES))}"
        )
    if name in STAGES and kind != name:
        raise ConfigError(f"{placed.where((name, 'kind'))}: {name!r} is a kind of stage itself; give the {kind} another name")
    if not _STAGE_NAME.fullmatch(name):
        raise ConfigError(f"{placed.place((name,))}: the name of a stage has letters, digits, - and _ alone, got {name!r}")
    return STAGES[kind]


def _own_section(name: str, placed: PlacedValues) -> tuple[Any, str | dict[str, str] | None]:
    """A stage's section without `kind` and `from`, and its `from`: a stage, or role → stage."""
    section = placed.values[name]
    if not isinstance(section, dict):
        return section, None
    sources = section.get("from")
    section = {key: value for key, value in section.items() if key not in ("kind", "from")}
    if sources is None or isinstance(sources, str):
        return section, sources
    if not isinstance(sources, dict) or not all(isinstance(stage, str) for stage in sources.values()):
        raise ConfigError(f"{placed.where((name, 'from'))}: must be the name of a stage above, or a role and a stage each")
    return section, {str(role): stage for role, stage in sources.items()}


def _check_stage(
    name: str, spec: StageSpec, placed: PlacedValues, above: list[Stage], folder: Path, *, allow_code: bool
) -> Stage:
    section, sources = _own_section(name, placed)
    shorthand = spec.config.shorthand if not isinstance(section, (dict, type(None))) else None

    def where(path: KeyPath) -> str:
        return placed.where((name,), path[1:] if shorthand and path[:1] == (shorthand,) else path)

    config = spec.config.parse(section, where)
    functions = tuple(config.user_functions())
    if not allow_code:
        refuse_code(config, placed.where((name,)))
    for function in functions:
        user_file(function, folder)
    specs = {stage.name: stage.spec for stage in above}
    inputs = spec.wire(config, specs, sources, lambda: placed.where((name,)), example_of)
    made_above = {stage.name: stage for stage in above}
    for source in inputs.values():
        lacking = made_above[source.stage].spec.lacks(made_above[source.stage].config)
        if source.kind in lacking:
            raise ConfigError(f"{placed.where((name,))}: needs {source.kind} of {source.stage}: {lacking[source.kind]}")
    checked = Stage(name, spec, config, inputs, functions)
    conflict = spec.conflict(config, {stage.name: stage.config for stage in feeding(above, checked)})
    if conflict is not None:
        raise ConfigError(f"{placed.where((name,))}: {conflict}")
    return checked


def recorded_stages(values: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages of a recipe that a run recorded. Files that it names may be gone: nothing is run from these stages.

    Raises ConfigError for a recipe that cannot be read here, as when the package of a stage is no longer installed.
    """
    placed = PlacedValues(_copied(dict(values)), {})
    specs = {key: _checked_spec(key, section, placed) for key, section in placed.values.items() if key not in _HEAD_KEYS}
    stages: list[Stage] = []
    for name, spec in specs.items():
        section, sources = _own_section(name, placed)
        config = spec.config.parse(section, name)
        inputs = spec.wire(config, {stage.name: stage.spec for stage in stages}, sources, partial(str, name))
        stages.append(Stage(name, spec, config, inputs, tuple(config.user_functions())))
    return tuple(stages)


def feeding(stages: Sequence[Stage], stage: Stage) -> list[Stage]:
    """The stages that a stage is made from, directly or through others, in the recipe's order."""
    names = {source.stage for source in stage.inputs.values()}
    for above in reversed(stages):
        if above.name in names:
            names.update(source.stage for source in above.inputs.values())
    return [above for above in stages if above.name in names]


def refuse_code(config: Config, where: str) -> None:
    """Raise ConfigError when settings name code, which may come from a stranger."""
    if functions := config.user_functions():
        raise ConfigError(
            f"{where}: names code of its own ({functions[0]}); read it and what it imports, then say --allow-code (in Python, "
            "allow_code=True)"
        )
