"""Tasks of the stage `evaluate`: each model asked in the form that suits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.core.progress import Progress
from bessemer.evaluation.questions import CHAT, PLAIN
from bessemer.evaluation.tasks import answers
from bessemer.inference.engine import Engine
from bessemer.tasks.options import TaskOptions
from bessemer.tasks.questions import GenerationQuestion, GenerationTask, Outcome
from bessemer.tasks.registry import find_tasks

_TRIED = 32


@dataclass(frozen=True)
class AskedTask:
    """A task by form: as messages for the chat template, and as text."""

    name: str
    forms: dict[str, GenerationTask]
    questions: dict[str, Sequence[GenerationQuestion]]


@dataclass(frozen=True)
class TaskAnswers:
    """A model's answers to the questions of a task, in their order, and the form they were asked in."""

    form: str
    outcomes: Sequence[Outcome]
    headline: str

    @property
    def scores(self) -> list[float]:
        """The headline score of each."""
        return [outcome.scores.get(self.headline, 0.0) for outcome in self.outcomes]

    @property
    def summary(self) -> dict[str, Any]:
        """For `results.json`."""
        return {"asked_as": self.form, "n": len(self.outcomes), self.headline: fmean(self.scores)}


def asked_task(name: str, limit: int) -> AskedTask:
    """The first `limit` questions of a task that needs no data. Raises ConfigError for one that is asked by likelihood."""
    forms: dict[str, GenerationTask] = {}
    for form in (CHAT, PLAIN):
        (task,) = find_tasks([name], TaskOptions(chat=form == CHAT, limit=limit))
        if not isinstance(task, GenerationTask):
            raise ConfigError(f"tasks: {name} is asked by likelihood; ask it with `bessemer evaluate MODEL --tasks {name}`")
        forms[form] = task
    return AskedTask(name, forms, {form: task.questions() for form, task in forms.items()})


def task_answers(engine: Engine, asked: AskedTask, progress: Progress, model: str) -> TaskAnswers:
    """A model's answers in the form in which it answers the first questions better."""
    tried: dict[str, TaskAnswers] = {}
    count = len(asked.questions[CHAT])
    first, rest = slice(min(_TRIED, count)), slice(_TRIED, None)
    with progress.task(f"{asked.name}: {model}", total=first.stop + count, unit="answers") as bar:

        def answered(form: str, part: slice) -> list[Outcome]:
            task, found = asked.forms[form], []
            for outcomes in answers(engine, task, asked.questions[form][part]):
                found += outcomes
                bar.advance(len(outcomes))
            return found

        for form, task in asked.forms.items():
            tried[form] = TaskAnswers(form, answered(form, first), task.headline(form))
        best = max(tried.values(), key=lambda one: sum(one.scores))
        return TaskAnswers(best.form, [*best.outcomes, *answered(best.form, rest)], best.headline)
