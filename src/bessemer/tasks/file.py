"""A task file: YAML with the settings of one task."""

from __future__ import annotations

from pathlib import Path

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError
from bessemer.core.yaml_file import read_yaml
from bessemer.tasks.choice import ChoiceTask
from bessemer.tasks.cloze import ClozeTask
from bessemer.tasks.config import KINDS, ChoiceConfig, ClozeConfig, FileTaskConfig, SchemaConfig
from bessemer.tasks.generate import GenerateTask
from bessemer.tasks.options import TaskOptions
from bessemer.tasks.questions import Task
from bessemer.tasks.schema import SchemaTask


def read_task(path: Path, options: TaskOptions | None = None) -> Task:
    """The task of a YAML file, with its data. Its data lies in the folder that the options name, or beside the file.

    Raises ConfigError for settings that are not valid, ArtefactError for data that does not fit them.
    """
    options = options or TaskOptions()
    config = with_options(read_task_config(path), options)
    return make_task(config, [*([options.data] if options.data else []), path.parent])


def read_task_config(path: Path) -> FileTaskConfig:
    """The settings of a task file. Raises ConfigError with the file's line for what is not valid."""
    placed = read_yaml(path)
    kind = placed.values.get("kind")
    if kind is None:
        raise ConfigError(f"{path}: 'kind' must be given: {', '.join(KINDS)}")
    if kind not in KINDS:
        raise ConfigError(f"{placed.place(('kind',))}: there is no kind of task {kind!r}{nearest(str(kind), list(KINDS))}")
    config: FileTaskConfig = KINDS[kind].parse(placed.values, lambda keys: placed.where((), keys))
    return config if config.name else config.with_changes(name=path.stem)


def with_options(config: FileTaskConfig, options: TaskOptions) -> FileTaskConfig:
    """The settings with those of a call in their place. Raises ConfigError where they do not go together."""
    given = options.model_dump(exclude={"data"}, exclude_none=True)
    return type(config).parse(
        config.model_dump() | {name: value for name, value in given.items() if name in type(config).model_fields},
        f"task {config.name}",
    )


def make_task(config: FileTaskConfig, folders: list[Path]) -> Task:
    """The task of some settings, its data looked for in the folders. Raises ArtefactError where it does not fit."""
    if isinstance(config, ChoiceConfig):
        return ChoiceTask(config, folders)
    if isinstance(config, SchemaConfig):
        return SchemaTask(config, folders)
    if isinstance(config, ClozeConfig):
        return ClozeTask(config, folders)
    return GenerateTask(config, folders)
