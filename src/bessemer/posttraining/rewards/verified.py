"""Rewards of answers that can be checked: by the task that asked, by the data's answer, by tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.core.records import Record
from bessemer.core.sandbox import Limits, Sandbox
from bessemer.posttraining.rewards.config import AnswerReward, ProgramReward, TaskReward
from bessemer.posttraining.rewards.registry import RewardContext, RewardFunction
from bessemer.posttraining.rewards.texts import texts_of
from bessemer.tasks.program import read_problem, tested_program, verdict
from bessemer.tasks.verifiers import Numeric

Completions = Sequence[str | Sequence[Mapping[str, Any]]]


def task_reward(settings: TaskReward, context: RewardContext) -> RewardFunction:
    """The headline score of a task, of columns `task` and `item`; None for prompts of no task, and where the task itself did
    not find out."""

    def reward(
        completions: Completions, task: Sequence[str | None] | None = None, item: Sequence[int] | None = None, **_: Any
    ) -> list[float | None]:
        rewards: list[float | None] = [None] * len(completions)
        if task is None or item is None:
            return rewards
        texts = texts_of(completions)
        for name in dict.fromkeys(task):
            if name is None or name not in context.tasks:
                continue
            of_name, questions = context.tasks[name]
            places = [place for place, other in enumerate(task) if other == name]
            asked = [(questions[item[place]], [texts[place]]) for place in places]
            for place, (question, _texts), outcome in zip(places, asked, of_name.judge_all(asked), strict=True):
                rewards[place] = outcome.scores.get(of_name.headline(question.form))
        return rewards

    return reward


def answer_reward(settings: AnswerReward, context: RewardContext) -> RewardFunction:
    """1.0 where a verifier accepts, else 0.0; None for a row without an answer.

    The reward raises ValueError for an answer of the data that the verifier can never accept.
    """

    def reward(completions: Completions, **columns: Any) -> list[float | None]:
        answers = columns.get(settings.column)
        if answers is None:
            raise ValueError(f"the data has no column {settings.column!r}")
        found: list[float | None] = []
        for text, given in zip(texts_of(completions), answers, strict=True):
            references = [str(each) for each in (given if isinstance(given, list) else [given]) if each is not None]
            if isinstance(settings.verifier, Numeric):
                references = [each.rpartition("####")[2].strip() for each in references]
            for reference in references:
                refusal = settings.verifier.refusal(reference)
                if refusal is not None:
                    raise ValueError(f"the right answer {reference!r} {refusal}")
            found.append(float(settings.verifier.verify(text, references)) if references else None)
        return found

    return reward


def program_reward(settings: ProgramReward, context: RewardContext) -> RewardFunction:
    """1.0 where the tests of a row of HumanEval's or MBPP's form pass. All programs run side by side, on all cores.

    Raises SandboxError where no tier is strong enough.
    """
    limits = Limits(seconds=settings.program_seconds, cpu_seconds=settings.program_seconds, memory=settings.memory)
    sandbox = Sandbox(limits, minimum=settings.sandbox)

    def reward(completions: Completions, prompts: Sequence[Any] = (), **columns: Any) -> list[float | None]:
        given = {name: values for name, values in columns.items() if isinstance(values, (list, tuple))}
        rows = [{name: values[place] for name, values in given.items()} for place in range(len(completions))]
        for row, prompt in zip(rows, prompts, strict=False):
            row.setdefault("prompt", prompt if isinstance(prompt, str) else prompt[-1]["content"])
        problems = [read_problem(Record(row, place, f"completion {place}")) for place, row in enumerate(rows)]
        texts = texts_of(completions)
        runs = [tested_program(problem, text) for problem, text in zip(problems, texts, strict=True)]
        results = sandbox.run_many([run.program for run in runs])
        return [
            float(verdict(run, result) == "passed" and bool(text.strip()))
            for run, result, text in zip(runs, results, texts, strict=True)
        ]

    return reward
