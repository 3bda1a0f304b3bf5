"""Tasks by name: the task files of this package, and what other packages add by the entry points `bessemer.tasks`.

The implementation of a plugin is a function of `TaskOptions` that gives a `Task`: a class whose constructor takes them is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bessemer.core.errors import ConfigError
from bessemer.core.registry import Plugin, Registry
from bessemer.tasks.core_tasks import CORE, core_tasks
from bessemer.tasks.file import read_task
from bessemer.tasks.options import TaskOptions
from bessemer.tasks.questions import Task

TaskFactory = Callable[[TaskOptions], Task]

_FILES = Path(__file__).parent / "files"
#: Names of our task files, each with a line about it.
_SHIPPED = {
    "arc_easy": "science questions of school exams, four choices",
    "copa": "the likelier cause or effect, two choices",
    "lambada_openai_small": "the last word of a passage that needs all of it",
    "openbook_qa": "elementary science, four choices",
    "piqa": "everyday physics, two choices",
    "simple_arithmetic": "sums, differences and products of small integers, as a continuation",
    "svamp": "word problems in one or two steps, a number generated",
    "triviaqa_small": "trivia, a short answer generated",
    "winograd_wsc": "what a pronoun stands for, by the likelihood of what follows",
}

TASKS: Registry[TaskFactory] = Registry(
    "task",
    "bessemer.tasks",
    [Plugin(name, about, partial(read_task, _FILES / f"{name}.yaml")) for name, about in _SHIPPED.items()],
)


def find_tasks(names: Sequence[str], options: TaskOptions | None = None) -> list[Task]:
    """Tasks by name or by file, with their data; `core` is every task of CORE whose data is there.

    Raises ConfigError for a name that is none, for one given twice, and for settings that are not valid; ArtefactError for data
    that does not fit.
    """
    options = options or TaskOptions()
    tasks: list[Task] = []
    for name in names:
        if name == CORE:
            tasks += core_tasks(options)
        elif name.endswith((".yaml", ".yml")):
            tasks.append(read_task(Path(name), options))
        else:
            tasks.append(TASKS.find(name).load()(options))
    if not tasks:
        raise ConfigError(f"no task is named; there are {', '.join([*TASKS, CORE])}, or a task file")
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise ConfigError(f"two tasks have the name {task.name!r}; name each once")
        seen.add(task.name)
    return tasks
