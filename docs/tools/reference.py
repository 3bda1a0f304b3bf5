"""Reference pages written from the code: every command with its options, every setting, the public Python names.

    python docs/tools/reference.py           # write docs/reference/settings.md: `make tables`
    python docs/tools/reference.py --check   # exit code 1 where the page says anything else than the code

The settings are committed, for readers of a checkout, and a test compares the page with the code. The others are no files: the
site's build asks for each (`hooks.py`).
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Union

import api_changes
from pydantic.fields import FieldInfo

from bessemer.core.config import Config
from bessemer.core.registry import Registry


def cli_page() -> str:
    """Every command: what it does, its arguments and its options with their defaults."""
    import typer

    from bessemer.cli.main import app

    group: Any = typer.main.get_command(app)
    panels: dict[str, list[tuple[str, Any]]] = {}
    for name, command in leaf_commands(group):
        panels.setdefault(group.commands[name.partition(" ")[0]].rich_help_panel, []).append((name, command))
    parts = [
        "# Command line\n\nGenerated from the commands themselves. `bessemer COMMAND --help` prints the same. A mistake ends "
        "in one line and exit code 2; `bessemer --debug COMMAND` adds the traceback. Ctrl-C ends with 130.\n"
    ]
    for title, commands in panels.items():
        parts.append(f"\n## {title}\n")
        parts += [_command(name, command) for name, command in commands]
    return "".join(parts)


def leaf_commands(group: Any) -> Iterator[tuple[str, Any]]:
    """The commands of a group by name, those of groups inside it by both names: `scaling fit`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", leaf) for inner, leaf in leaf_commands(command))
        else:
            yield name, command


def _command(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if is_argument(parameter)]
    options = [one for one in command.params if not is_argument(one) and not getattr(one, "hidden", False)]
    usage = " ".join([f"bessemer {name}", *map(_usage, arguments), *(["[OPTIONS]"] if options else [])])
    anchor = name.replace(" ", "-")
    examples = (command.epilog or "").removeprefix("Example: ").replace("\n\n", "\n")
    lines = [f"\n### bessemer {name} {{ #{anchor} }}\n\n{_prose(inspect.cleandoc(command.help or ''))}\n\n```\n{usage}\n```\n"]
    lines.append(f"\n```\n{examples}\n```\n")
    if arguments:
        lines.append("\n| argument | |\n|---|---|\n")
        lines += [f"| `{shown_name(parameter)}` | {_cell(parameter.help or '')} |\n" for parameter in arguments]
    if options:
        lines.append("\n| option | | default |\n|---|---|---|\n")
        lines += [f"| {_flags(parameter)} | {_cell(parameter.help or '')} | {_default(parameter)} |\n" for parameter in options]
    return "".join(lines)


def is_argument(parameter: Any) -> bool:
    """Whether a parameter of a command is given by its place and not by a name."""
    return not parameter.opts[0].startswith("-")


def shown_name(parameter: Any) -> str:
    """How the reference calls a parameter: an argument in capitals, an option by its first name."""
    return (parameter.metavar or parameter.name.upper()) if is_argument(parameter) else parameter.opts[0]


def _usage(argument: Any) -> str:
    name = shown_name(argument) + (" …" if argument.nargs != 1 else "")
    return name if argument.required else f"[{name}]"


def _flags(parameter: Any) -> str:
    names = " ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names if parameter.is_flag else f"{names} *{_kind(parameter)}*"


def _kind(parameter: Any) -> str:
    """The type of an option's value, from typer's description of it or, in older ones, click's."""
    descriptor = getattr(parameter, "type_descriptor", None)
    annotation = getattr(descriptor, "annotation", None) if descriptor else getattr(parameter.type, "name", "text")
    kinds = {str: "text", int: "number", float: "number", Path: "path", "integer": "number", "float": "number"}
    annotation = next(iter(typing.get_args(annotation)), annotation)
    return parameter.metavar or kinds.get(annotation) or (annotation if isinstance(annotation, str) else annotation.__name__)


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`" if isinstance(value, (int, float, str, Path)) else ""


def settings_page() -> str:
    """Every setting of a recipe, stage by stage, then those of the engine, of a request, of the server, and of a task file."""
    from bessemer.agents.config import Budget, McpServerConfig
    from bessemer.assistant.conversation import AssistantConfig
    from bessemer.inference.config import EngineConfig
    from bessemer.inference.sampling.params import SamplingParams
    from bessemer.pipeline.recipe import RecipeHead
    from bessemer.pipeline.stages import STAGES
    from bessemer.serving.config import ServingConfig
    from bessemer.serving.tinker.config import TinkerLimits, TrainingSettings
    from bessemer.tasks.registry import KINDS

    # the registry that no stage loads: the page is the same whatever ran before
    import_module("bessemer.assistant.tool_formats")
    page = _SettingsPage()
    parts = [
        "# Settings\n\nGenerated from the classes that check a recipe. The same names are the recipe's keys, the overrides of "
        "`bessemer run` (`pretrain.steps=100`) and the arguments in Python. A setting marked ○ cannot change what a stage "
        "makes: it stays out of the stage's key, so a finished stage is reused whatever it says. A setting without a default "
        "must be given.\n",
        _heading(2, "The recipe itself", "recipe") + "\n",
        page.table(RecipeHead),
        *page.sections(level=3),
    ]
    for name, spec in STAGES.items():
        parts.append(f"{_heading(2, name, name)}\n\n{_prose(spec.summary)}\n\n{_prose(_docstring(spec.config))}\n")
        reads = ", ".join(kind.removesuffix("?") for kind in spec.needs.values())
        parts.append(f"\nReads: {reads or 'nothing of another stage'}. Makes: {', '.join(spec.makes)}.\n")
        parts.append(page.table(spec.config))
        parts += page.sections(level=3)
    for title, anchor, config in (
        ("The engine", "engine", EngineConfig),
        ("A request", "request", SamplingParams),
        ("A turn of the assistant", "assistant", AssistantConfig),
        ("An agent's budget", "agent", Budget),
        ("An MCP server", "mcp-server", McpServerConfig),
        ("The server", "server", ServingConfig),
        ("The Tinker server: what it holds", "tinker", TinkerLimits),
        ("The Tinker server: how it computes", "tinker-training", TrainingSettings),
        *((f"A task file: {name}", f"task-{name}", kind.config) for name, kind in KINDS.items()),
    ):
        parts.append(f"{_heading(2, title, anchor)}\n\n{_prose(_docstring(config))}\n")
        parts.append(page.table(config))
        parts += page.sections(level=3)
    return "".join(parts)


class _SettingsPage:
    """Tables of settings.

    Nested settings get a section of their own, once on the page, behind the first that holds them. So do the names that a
    setting may hold where these are in a registry, and the settings of each.
    """

    def __init__(self) -> None:
        self._named: dict[type[Config], str] = {}
        self._titles: dict[type[Config], str] = {}
        self._waiting: list[type[Config] | Registry[Any]] = []
        self._registries = {registry.group: registry for registry in loaded_registries()}
        self._listed: set[str] = set()

    def table(self, config: type[Config]) -> str:
        """The settings of one class as a table."""
        rows = [self._row(name, field) for name, field in config.model_fields.items()]
        return "\n| setting | type | default | unit | |\n|---|---|---|---|---|\n" + "".join(rows)

    def sections(self, level: int) -> Iterator[str]:
        """The sections of nested settings that tables have named so far and that are not on the page yet."""
        while self._waiting:
            one = self._waiting.pop(0)
            if isinstance(one, Registry):
                yield f"{_heading(level, f'Names of {one.kind}', _group_anchor(one.group))}\n{self._names(one)}"
                continue
            title = self._titles.get(one) or _title(one)
            yield f"{_heading(level, title, self._named[one])}\n\n{_prose(_docstring(one))}\n{self.table(one)}"

    def _names(self, registry: Registry[Any]) -> str:
        rows = []
        for name, plugin in registry.items():
            settings = ""
            if plugin.settings is not None:
                sharing = [other for other, one in registry.items() if one.settings is plugin.settings]
                self._titles.setdefault(plugin.settings, f"{registry.kind} {', '.join(sharing)}")
                settings = f"[settings](#{self._anchor(plugin.settings)})"
            rows.append(f"| `{name}` | {_cell(plugin.description)} | {settings} |\n")
        return (
            f"\nOther packages add names by entry points of the group `{registry.group}`.\n\n| name | | |\n|---|---|---|\n"
            + "".join(rows)
        )

    def _row(self, name: str, field: FieldInfo) -> str:
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        mark = "" if extra.get("affects_output", True) else " ○"
        limits = _limits(field)
        registry = self._registries[str(extra["plugins"])] if extra.get("plugins") else None
        kind = self._type(field.annotation, registry) + (f" {limits}" if limits else "")
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
            self._named[config] = "settings-" + _title(config).replace(" ", "-")
            self._waiting.append(config)
        return self._named[config]

    def _type(self, annotation: Any, registry: Registry[Any] | None = None) -> str:
        """A type as a reader of YAML knows it; a class of settings is a link to its table, as is a name of a registry."""
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if registry is not None:
            if registry.group not in self._listed:
                self._listed.add(registry.group)
                self._waiting.append(registry)
            names = f"[{registry.kind}](#{_group_anchor(registry.group)})"
            return f"list of {names}" if origin in (list, tuple) else names
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
    """`source wheels` for settings with a literal name of a kind, else the class's name in words."""
    for kind, field in config.model_fields.items():
        if (
            typing.get_origin(field.annotation) is typing.Literal
            and isinstance(field.default, str)
            and len(typing.get_args(field.annotation)) == 1
        ):
            return f"{kind} {field.default}"
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", config.__name__.removesuffix("Config") or config.__name__).lower()


def loaded_registries() -> list[Registry[Any]]:
    """The registries of the modules of ours that are loaded."""
    ours = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("bessemer")]
    found = {id(value): value for names in ours for value in list(names.values()) if isinstance(value, Registry)}
    return list(found.values())


def _group_anchor(group: str) -> str:
    return group.replace(".", "-")


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
            path = f"{bessemer._PUBLIC[name][0]}.{name}"
            # the engine's methods are in several classes
            options = f"heading_level: 2, heading: bessemer.{name}, toc_label: {name}, inherited_members: true"
            parts.append(f"\n::: {path}\n    options: {{{options}}}\n")
    parts.append(
        "\n## For plugins { #plugins }\n\nWhat other packages implement and register ([contributing](../contributing.md)).\n"
    )
    for name in ("bessemer.core.registry.Plugin", "bessemer.core.registry.Registry", "bessemer.core.stage.StageSpec"):
        label = name.rpartition(".")[2]
        parts.append(f"\n::: {name}\n    options: {{heading_level: 3, heading: {name}, toc_label: {label}}}\n")
    return "".join(parts)


def api_text() -> str:
    """The same as text: each stable name's signature and docstring, and those of its public methods; read, not imported."""
    api = api_changes.stable_api(ROOT)
    parts = ["# Python API\n\nFrom the docstrings of the sources.\n"]
    for name, alias in api.members.items():
        found = alias.final_target
        parts.append(f"\n## {name}\n\n{_signature(found)}{_docstring_of(found)}")
        if found.is_class:
            for method, inner in found.all_members.items():
                if inner.is_function and not method.startswith("_"):
                    parts.append(f"\n### {name}.{method}\n\n{_signature(inner)}{_docstring_of(inner)}")
    return "".join(parts)


def _signature(found: Any) -> str:
    if found.is_function:
        return f"```python\n{found.signature()}\n```\n\n"
    return f"```python\nclass {found.name}\n```\n\n"


def _docstring_of(found: Any) -> str:
    return f"{inspect.cleandoc(found.docstring.value)}\n" if found.docstring else ""


def _heading(level: int, title: str, anchor: str) -> str:
    """A heading; where links do not lead to its own words, below a place of that name, which code hosts know in this form."""
    anchor = anchor.replace(" ", "-")
    own = re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
    return ("" if own == anchor else f'\n<a id="{anchor}"></a>\n') + f"\n{'#' * level} {title}"


def _prose(text: str) -> str:
    return text.replace("<", "&lt;")


def _cell(text: str) -> str:
    return _bars(_prose(" ".join(text.split())))


def _bars(text: str) -> str:
    return text.replace("|", "\\|")


#: What the site's build makes.
PAGES = {"reference/cli.md": cli_page, "reference/api.md": api_page}
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ROOT / "docs" / "reference" / "settings.md"


def main() -> None:
    """Write the page of settings, or compare it with the code."""
    made = settings_page()
    there = SETTINGS.read_text(encoding="utf-8") if SETTINGS.exists() else ""
    if "--check" in sys.argv[1:]:
        sys.exit(made != there)
    SETTINGS.parent.mkdir(exist_ok=True)
    SETTINGS.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
