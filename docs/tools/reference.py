"""Reference pages written from the code: every command with its options, every setting, the public Python names.

Nothing here is committed as a page: the site's build asks for each (`hooks.py`), so a page cannot disagree with the code.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

from pydantic.fields import FieldInfo

from bessemer.core.config import Config

#: The commands in the order of a reader's way through them.
_GROUPS = {
    "Make": ("run", "recipes", "init", "plan", "doctor"),
    "Look": ("show", "explain", "inspect", "compare"),
    "Data": ("clean", "forget", "train-classifier", "train-words"),
    "Use a model": ("chat", "generate", "serve", "demo"),
    "Change a model": ("import", "export", "quantize", "extend", "average"),
}


def cli_page() -> str:
    """Every command: what it does, its arguments and its options with their defaults."""
    import typer

    from bessemer.cli.main import app

    group: Any = typer.main.get_command(app)
    commands: dict[str, Any] = dict(group.commands)
    order = {title: [name for name in names if name in commands] for title, names in _GROUPS.items()}
    placed = {name for names in order.values() for name in names}
    order["Further commands"] = sorted(commands.keys() - placed)
    parts = [
        "# Command line\n\nGenerated from the commands themselves. `bessemer COMMAND --help` prints the same. A mistake ends "
        "in one line and exit code 2; `bessemer --debug COMMAND` adds the traceback. Ctrl-C ends with 130.\n"
    ]
    for title, names in order.items():
        if names:
            parts.append(f"\n## {title}\n")
            parts += [_command(name, commands[name]) for name in names]
    return "".join(parts)


def _command(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join([f"bessemer {name}", *map(_usage, arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"\n### bessemer {name} {{ #{name} }}\n\n{_prose(inspect.cleandoc(command.help or ''))}\n\n```\n{usage}\n```\n"]
    if arguments:
        lines.append("\n| argument | |\n|---|---|\n")
        lines += [f"| `{parameter.human_readable_name}` | {_cell(parameter.help or '')} |\n" for parameter in arguments]
    if options:
        lines.append("\n| option | | default |\n|---|---|---|\n")
        lines += [f"| {_flags(parameter)} | {_cell(parameter.help or '')} | {_default(parameter)} |\n" for parameter in options]
    return "".join(lines)


def _usage(argument: Any) -> str:
    name = argument.human_readable_name + (" …" if argument.nargs != 1 else "")
    return name if argument.required else f"[{name}]"


def _flags(parameter: Any) -> str:
    kind = "" if parameter.is_flag else f" {_kind(parameter)}"
    names = " ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names + kind


def _kind(parameter: Any) -> str:
    name = parameter.metavar or {"text": "TEXT", "integer": "INTEGER", "float": "FLOAT", "path": "PATH"}.get(
        parameter.type.name.partition(" ")[0], parameter.type.name.upper()
    )
    return f"*{name}*"


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`" if isinstance(value, (int, float, str, Path)) else ""


def settings_page() -> str:
    """Every setting of a recipe, stage by stage, then those of the engine, of a request, and of the server."""
    from bessemer.inference.config import EngineConfig
    from bessemer.inference.sampling.params import SamplingParams
    from bessemer.pipeline.recipe import RecipeHead
    from bessemer.pipeline.stages import STAGES
    from bessemer.serving.config import ServingConfig

    page = _SettingsPage()
    parts = [
        "# Settings\n\nGenerated from the classes that check a recipe. The same names are the recipe's keys, the overrides of "
        "`bessemer run` (`pretrain.steps=100`) and the arguments in Python. A setting marked ○ cannot change what a stage "
        "makes: it stays out of the stage's key, so a finished stage is reused whatever it says. A setting without a default "
        "must be given.\n",
        "\n## The recipe itself { #recipe }\n",
        page.table(RecipeHead),
    ]
    for name, spec in STAGES.items():
        parts.append(f"\n## {name} {{ #{name} }}\n\n{_prose(_docstring(spec.config))}\n")
        reads = ", ".join(kind.removesuffix("?") for kind in spec.needs.values())
        parts.append(f"\nReads: {reads or 'nothing of another stage'}. Makes: {', '.join(spec.makes)}.\n")
        parts.append(page.table(spec.config))
        parts += page.sections(level=3)
    for title, anchor, config in (
        ("The engine", "engine", EngineConfig),
        ("A request", "request", SamplingParams),
        ("The server", "server", ServingConfig),
    ):
        parts.append(f"\n## {title} {{ #{anchor} }}\n\n{_prose(_docstring(config))}\n")
        parts.append(page.table(config))
        parts += page.sections(level=3)
    return "".join(parts)


class _SettingsPage:
    """Tables of settings. Nested settings get a section of their own, once on the page, behind the first that holds them."""

    def __init__(self) -> None:
        self._named: dict[type[Config], str] = {}
        self._waiting: list[type[Config]] = []

    def table(self, config: type[Config]) -> str:
        """The settings of one class as a table."""
        rows = [self._row(name, field) for name, field in config.model_fields.items()]
        return "\n| setting | type | default | unit | |\n|---|---|---|---|---|\n" + "".join(rows)

    def sections(self, level: int) -> Iterator[str]:
        """The sections of nested settings that tables have named so far and that are not on the page yet."""
        while self._waiting:
            config = self._waiting.pop(0)
            anchor = self._named[config]
            yield f"\n{'#' * level} {_title(config)} {{ #{anchor} }}\n\n{_prose(_docstring(config))}\n{self.table(config)}"

    def _row(self, name: str, field: FieldInfo) -> str:
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        mark = "" if extra.get("affects_output", True) else " ○"
        limits = _limits(field)
        kind = self._type(field.annotation) + (f" {limits}" if limits else "")
        unit = extra.get("unit") or ""
        return f"| `{name}`{mark} | {_bars(kind)} | {self._value(field)} | {unit} | {_cell(field.description or '')} |\n"

    def _value(self, field: FieldInfo) -> str:
        if field.is_required():
            return "required"
        value = field.get_default(call_default_factory=True)
        if isinstance(value, Config):
            return f"[its defaults](#{self._anchor(type(value))})"
        if value is None:
            return "none"
        return f"`{_bars(json.dumps(value, ensure_ascii=False, default=str))}`"

    def _anchor(self, config: type[Config]) -> str:
        if config not in self._named:
            self._named[config] = "settings-" + re.sub(r"(?<=[a-z])(?=[A-Z])", "-", config.__name__).lower()
            self._waiting.append(config)
        return self._named[config]

    def _type(self, annotation: Any) -> str:
        """A type as a reader of YAML knows it; a class of settings is a link to its table."""
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, Config):
            return f"[{_title(annotation)}](#{self._anchor(annotation)})"
        if origin is typing.Annotated:
            return self._type(arguments[0])
        if origin in (Union, types.UnionType):
            return " or ".join(dict.fromkeys(self._type(one) for one in arguments if one is not type(None)))
        if origin is typing.Literal:
            return " or ".join(f"`{value}`" for value in arguments)
        if origin in (list, tuple, set, frozenset, Sequence):
            return f"list of {self._type(arguments[0])}" if arguments else "list"
        if origin in (dict, Mapping):
            return f"map of {self._type(arguments[0])} to {self._type(arguments[1])}"
        known = {str: "text", int: "integer", float: "number", bool: "true or false", dict: "map", list: "list", Any: "any"}
        return known.get(annotation) or getattr(annotation, "__name__", str(annotation))


def _limits(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [(signs[name], getattr(one, name)) for one in field.metadata for name in signs if hasattr(one, name)]
    return ", ".join(f"{sign} {value:,}" for sign, value in bounds)


def _title(config: type[Config]) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", config.__name__.removesuffix("Config") or config.__name__)


def _docstring(config: type[Config]) -> str:
    return inspect.cleandoc(config.__doc__ or "")


def api_page() -> str:
    """The public names of `bessemer`, and those that a plugin implements, for mkdocstrings to fill in."""
    import bessemer

    parts = [
        "# Python API\n\nGenerated from docstrings. `import bessemer` loads none of the heavy libraries; each name is loaded "
        "on first use.\n"
    ]
    for name in bessemer.__all__:
        if not name.startswith("_"):
            parts.append(f"\n::: {bessemer._PUBLIC[name]}.{name}\n    options: {{heading_level: 2}}\n")
    parts.append(
        "\n## For plugins { #plugins }\n\nWhat other packages implement and register ([contributing](../contributing.md)).\n"
    )
    for name in ("bessemer.core.registry.Plugin", "bessemer.core.registry.Registry", "bessemer.core.stage.StageSpec"):
        parts.append(f"\n::: {name}\n    options: {{heading_level: 3}}\n")
    return "".join(parts)


def _prose(text: str) -> str:
    return text.replace("<", "&lt;")


def _cell(text: str) -> str:
    return _bars(_prose(" ".join(text.split())))


def _bars(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {"reference/cli.md": cli_page, "reference/settings.md": settings_page, "reference/api.md": api_page}
