"""Task files: YAML with the settings of one task, whose `kind` names its class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError
from bessemer.core.yaml_file import read_yaml
from bessemer.tasks.code import CodeConfig, CodeTask
from bessemer.tasks.config import ChoiceConfig, ClozeConfig, GenerateConfig, PromptConfig, SchemaConfig, TaskOptions
from bessemer.tasks.generate import GenerateTask
from bessemer.tasks.generated_tasks import (
    ArithmeticConfig,
    ArithmeticTask,
    NeedleConfig,
    NeedleTask,
    VariableTrackingConfig,
    VariableTrackingTask,
)
from bessemer.tasks.instruction_following import ConstraintsConfig, ConstraintsTask
from bessemer.tasks.judged import JudgedConfig, JudgedTask
from bessemer.tasks.likelihood import ChoiceTask, ClozeTask, SchemaTask
from bessemer.tasks.questions import Task


class Kind(NamedTuple):
    """A kind of task. make: from settings of that class, and the folders in which its data may lie, to the task."""

    config: type[PromptConfig]
    make: Callable[[Any, list[Path]], Task]


KINDS: dict[str, Kind] = {
    "choice": Kind(ChoiceConfig, ChoiceTask),
    "schema": Kind(SchemaConfig, SchemaTask),
    "cloze": Kind(ClozeConfig, ClozeTask),
    "generate": Kind(GenerateConfig, GenerateTask),
    "arithmetic": Kind(ArithmeticConfig, lambda config, _: ArithmeticTask(config)),
    "needle": Kind(NeedleConfig, lambda config, _: NeedleTask(config)),
    "variable_tracking": Kind(VariableTrackingConfig, lambda config, _: VariableTrackingTask(config)),
    "constraints": Kind(ConstraintsConfig, ConstraintsTask),
    "code": Kind(CodeConfig, CodeTask),
    "judged": Kind(JudgedConfig, JudgedTask),
}


C = TypeVar("C", bound=PromptConfig)


def read_task(path: Path, options: TaskOptions | None = None) -> Task:
    """The task of a YAML file, with its data. Its data lies in the folder that the options name, or beside the file.

    Raises ConfigError for settings that are not valid, ArtefactError for data that does not fit them.
    """
    options = options or TaskOptions()
    kind, config = read_task_config(path)
    return KINDS[kind].make(with_options(config, options), [*([options.data] if options.data else []), path.parent])


def read_task_config(path: Path) -> tuple[str, PromptConfig]:
    """The kind and the settings of a task file. Raises ConfigError with the file's line for what is not valid."""
    placed = read_yaml(path)
    kind = placed.values.get("kind")
    if kind is None:
        raise ConfigError(f"{path}: 'kind' must be given: {', '.join(KINDS)}")
    if kind not in KINDS:
        raise ConfigError(f"{placed.place(('kind',))}: there is no kind of task {kind!r}{nearest(str(kind), list(KINDS))}")
    config = KINDS[kind].config.parse(placed.values, lambda keys: placed.where((), keys))
    return kind, config if config.name else config.with_changes(name=path.stem)


def with_options(config: C, options: TaskOptions) -> C:
    """The settings overridden by those of a call. Raises ConfigError where they contradict each other."""
    given = options.model_dump(exclude={"data"}, exclude_none=True)
    return type(config).parse(
        config.model_dump() | {name: value for name, value in given.items() if name in type(config).model_fields},
        f"task {config.name}",
    )
