"""The base of every settings object, and the plain-language errors that it gives.

One class is at once the recipe's section, the Python API's argument, the `KEY=VALUE` override and the reference
page, so a field is declared once, with its description and unit, through `setting`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, SerializationInfo, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, core_schema

from bessemer.core.errors import ConfigError
from bessemer.core.usercode import is_user_function


def setting(
    default: Any = ...,
    description: str = "",
    *,
    unit: str | None = None,
    affects_output: bool = True,
    code: bool = False,
    plugins: str | None = None,
    **limits: Any,
) -> Any:
    """A field of a `Config`: its default (`...` when it must be given), what it means, in which unit.

    `affects_output=False` marks a field that cannot change the result (workers, log interval, paths): it stays
    out of the stage's key. `code=True` marks one that may name a user's own `file.py:function`, alone or in a list.
    `plugins` is the entry-point group of the registry whose names the field holds (`bessemer.filters`), alone or in a list.
    `limits` are pydantic's own (`ge`, `gt`, `le`, `min_length`, …). A mutable default is given as `default_factory=list`.
    """
    extra: dict[str, Any] = {"affects_output": affects_output}
    if unit:
        extra["unit"] = unit
    if code:
        extra["code"] = True
    if plugins:
        extra["plugins"] = plugins
    if "default_factory" in limits:
        return Field(description=description, json_schema_extra=extra, **limits)
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Config(BaseModel):
    """Typed settings: unknown keys are refused with the nearest valid name, and fields know if they change the output."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    #: The field that a bare list or word stands for: `deduplicate: [exact]` means `{methods: [exact]}`.
    shorthand: ClassVar[str | None] = None
    #: Settings of earlier versions, each with what to write now: `{"max_running": "max_num_seqs"}`.
    retired: ClassVar[Mapping[str, str]] = {}
    #: Groups of settings of which at most one is given. In an override, or a recipe that extends another, the given one
    #: replaces an inherited one: `steps` replaces `minutes`.
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @classmethod
    def parse(cls, values: Any, where: Callable[[tuple[str | int, ...]], str] | str = "") -> Self:
        """Build from plain values. Raises ConfigError, one line, naming the place with `where`.

        `where` is the name of the section (`"pretrain"`), or a function from the path of the offending key inside
        it to a description of its place (the recipe's gives file and line).
        """
        if isinstance(values, cls):
            return values
        if values is None:
            values = {}
        if not isinstance(values, Mapping) and cls.shorthand:
            values = {cls.shorthand: values}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, where)) from None

    @classmethod
    def replaced_by(cls, given: Collection[str]) -> set[str]:
        """The inherited settings that the given ones replace, as their `alternatives`."""
        names = set(given)
        return {name for group in cls.alternatives if not names.isdisjoint(group) for name in group} - names

    def output_settings(self) -> dict[str, Any]:
        """The settings that can change the result, as plain JSON values, nested ones included."""
        kept: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("affects_output") is False:
                continue
            kept[name] = _plain(getattr(self, name))
        return kept

    def incidental_settings(self) -> dict[str, Any]:
        """The settings that cannot change the result, by name."""
        names = type(self).model_fields.keys() - self.output_settings().keys()
        return {name: value for name, value in self.model_dump(mode="json").items() if name in names}

    def user_functions(self) -> list[str]:
        """Every `file.py:function` in the fields that may name one, nested settings included; sorted, each once."""
        functions: set[str] = set()
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            may_name = isinstance(extra, dict) and extra.get("code") is True
            configs, texts = _configs_and_texts(getattr(self, name))
            functions.update(function for config in configs for function in config.user_functions())
            functions.update(text for text in texts if may_name and is_user_function(text))
        return sorted(functions)

    def plugins(self) -> list[tuple[str, str]]:
        """(entry-point group, name) of every plugin that the settings name, nested settings included; our own too."""
        plugins: set[tuple[str, str]] = set()
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            group = extra.get("plugins") if isinstance(extra, dict) else None
            configs, texts = _configs_and_texts(getattr(self, name))
            plugins.update(plugin for config in configs for plugin in config.plugins())
            plugins.update((group, text) for text in texts if isinstance(group, str))
        return sorted(plugins)

    def with_changes(self, **changes: Any) -> Self:
        """A checked copy with some fields changed. Fields that are neither given nor changed count as not given in the copy."""
        changed = type(self).parse(self.model_dump() | changes)
        changed.model_fields_set.intersection_update(self.model_fields_set | changes.keys())
        return changed


class ChosenSettings:
    """Annotation of a field whose class of settings depends on a key: `Annotated[Config, ChosenSettings("source", …)]`.

    Unlike a tagged union it takes classes that are not known when the field is declared: those of plugins.
    key: the settings' key whose value is the name. choose: returns a name's tag, which stands in the path of errors as that of
    a union's member does in pydantic, and its class; raises ValueError or ConfigError for an unknown name.
    """

    def __init__(self, key: str, choose: Callable[[str], tuple[str, type[Config]]]) -> None:
        self._key = key
        self._choose = choose

    def settings_class(self, tag: str) -> type[Config] | None:
        """The class of a tag; None for an unknown tag."""
        try:
            known, kind = self._choose(tag)
        except (ValueError, ConfigError):
            return None
        return kind if known == tag else None

    def _validated(self, value: Any) -> Config:
        if isinstance(value, Config):
            return value
        name = value.get(self._key) if isinstance(value, Mapping) else None
        if not isinstance(name, str):
            raise ValueError(f"{self._key!r} must be given")
        try:
            tag, kind = self._choose(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            raise ValidationError.from_exception_data(
                error.title,
                [
                    InitErrorDetails(
                        type=problem["type"],
                        loc=(tag, *problem["loc"]),
                        input=problem["input"],
                        ctx=problem.get("ctx", {}),
                    )
                    for problem in error.errors()
                ],
            ) from None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        def dumped(value: Config, info: SerializationInfo) -> dict[str, Any]:
            return value.model_dump(mode=info.mode)

        serialization = core_schema.plain_serializer_function_ser_schema(dumped, info_arg=True)
        return core_schema.no_info_plain_validator_function(self._validated, serialization=serialization)


def _configs_and_texts(value: Any) -> tuple[list[Config], list[str]]:
    """The settings objects and the texts in a value, in mappings and lists too. Those inside the objects are not included."""
    if isinstance(value, Config):
        return [value], []
    if isinstance(value, str):
        return [], [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    inner = [_configs_and_texts(item) for item in items]
    return [config for configs, _ in inner for config in configs], [text for _, texts in inner for text in texts]


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.output_settings()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


#: Most names that an error message lists.
_MOST_SHOWN = 12


def nearest(name: str, known: list[str]) -> str:
    """A hint for a misspelt name: `; did you mean 'x'?`, or the first of the known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(sorted(known)[:_MOST_SHOWN])
    more = f", and {len(known) - _MOST_SHOWN} more" if len(known) > _MOST_SHOWN else ""
    return f"; known: {shown}{more}" if known else ""


def explain(error: ValidationError, cls: type[BaseModel], where: Callable[[tuple[str | int, ...]], str] | str) -> str:
    """The first problem of a pydantic error, in one line that a user can act on.

    A misspelt key comes before the missing one that it should have been.
    """
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    path = tuple(problem["loc"])
    if problem["type"] == "missing":
        path, absent = path[:-1], path[-1]
    place = where(path) if callable(where) else ".".join([where, *map(str, path)] if where else [*map(str, path)])
    if problem["type"] == "extra_forbidden":
        replacement = _retired(cls, path)
        if replacement is not None:
            return f"{place}: the setting {str(path[-1])!r} is now {replacement!r}"
        return f"{place}: unknown key {str(path[-1])!r}{nearest(str(path[-1]), _known_keys(cls, path[:-1]))}"
    if problem["type"] == "missing":
        return f"{place}: {str(absent)!r} must be given"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = problem.get("input")
    shown = (
        f", got {given!r}" if isinstance(given, (str, int, float, bool)) or given is None else f", got a {type(given).__name__}"
    )
    return f"{place}: {message}{shown if problem['type'] != 'value_error' else ''}"


def _retired(cls: type[BaseModel], path: tuple[str | int, ...]) -> str | None:
    """The setting that replaces the key at `path` below `cls`; None when no earlier version had that key."""
    models = (model for model in _candidates(cls, path[:-1]) if issubclass(model, Config))
    return next((model.retired[str(path[-1])] for model in models if str(path[-1]) in model.retired), None)


def _known_keys(cls: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """The field names valid at `path` below `cls`."""
    return sorted({name for model in _candidates(cls, path) for name in model.model_fields})


def _candidates(cls: type[BaseModel], path: tuple[str | int, ...]) -> list[type[BaseModel]]:
    """The settings that `path` below `cls` may lead to; lists and unions are followed by the names they contain."""
    candidates: list[type[BaseModel]] = [cls]
    choices: list[ChosenSettings] = []
    for step in path:
        # a list's index: its members stay the candidates
        if isinstance(step, int):
            continue
        fields = [model.model_fields[step] for model in candidates if step in model.model_fields]
        if fields:
            candidates = _models_in(fields[0].annotation)
            # pydantic moves a field's own annotation into its metadata
            of_field = [one for one in fields[0].metadata if isinstance(one, ChosenSettings)]
            choices = of_field + _choices_in(fields[0].annotation)
        else:  # the tag that stands in the path of a union's member
            chosen: list[type[BaseModel]] = [kind for choice in choices if (kind := choice.settings_class(step)) is not None]
            candidates = chosen or [model for model in candidates if step in _tags(model)] or candidates
    return candidates


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _choices_in(annotation: Any) -> list[ChosenSettings]:
    own = [choice for choice in getattr(annotation, "__metadata__", ()) if isinstance(choice, ChosenSettings)]
    return own + [choice for part in getattr(annotation, "__args__", ()) for choice in _choices_in(part)]


def _tags(model: type[BaseModel]) -> set[str]:
    """The literal values by which a member of a tagged union is recognised, with its own name."""
    tags = {model.__name__}
    for field in model.model_fields.values():
        tags.update(str(value) for value in getattr(field.annotation, "__args__", ()) if isinstance(value, str))
    return tags
