"""The kinds of task that a task file may name: the settings of each, and what makes a task of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.tasks.choice import ChoiceTask
from bessemer.tasks.cloze import ClozeTask
from bessemer.tasks.code import CodeConfig, CodeTask
from bessemer.tasks.config import ChoiceConfig, ClozeConfig, GenerateConfig, PromptConfig, SchemaConfig
from bessemer.tasks.constraints_task import ConstraintsConfig, ConstraintsTask
from bessemer.tasks.generate import GenerateTask
from bessemer.tasks.generated.config import ArithmeticConfig, NeedleConfig, VariableTrackingConfig
from bessemer.tasks.generated.task import ArithmeticTask, NeedleTask, VariableTrackingTask
from bessemer.tasks.judged import JudgedConfig, JudgedTask
from bessemer.tasks.questions import Task
from bessemer.tasks.schema import SchemaTask


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
