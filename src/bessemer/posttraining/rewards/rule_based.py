"""Rewards by rule: right answers, tests, form, length, and what an environment returns.

An answer is checked by the task that asked, by the data's answer or by tests; the form by a pattern, a JSON schema or parts
in tags; length and repetition are counted in tokens; an episode has the reward of its environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.core.json_schema import schema_check
from bessemer.core.records import Record
from bessemer.core.sandbox import Limits, Sandbox
from bessemer.posttraining.rewards.config import (
    AnswerReward,
    EnvironmentReward,
    FormatReward,
    JSONSchemaReward,
    LengthReward,
    OverlongReward,
    PatternReward,
    ProgramReward,
    RepetitionReward,
    RewardContext,
    RewardFunction,
    TaskReward,
)
from bessemer.tasks.code import read_problem, tested_program, verdict
from bessemer.tasks.verifiers import Numeric


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion, or of the last of its messages."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def texts_of(completions: Sequence[str | Sequence[Mapping[str, Any]]]) -> list[str]:
    """The texts of completions."""
    return [text_of(completion) for completion in completions]


Completions = Sequence[str | Sequence[Mapping[str, Any]]]

_FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


def pattern_reward(settings: PatternReward, context: RewardContext) -> RewardFunction:
    """1.0 where the pattern matches, else 0.0."""
    pattern = re.compile(settings.pattern, re.DOTALL)
    matches = pattern.fullmatch if settings.whole else pattern.search

    def reward(completions: Completions, **_: Any) -> list[float | None]:
        return [float(matches(text) is not None) for text in texts_of(completions)]

    return reward


def format_reward(settings: FormatReward, context: RewardContext) -> RewardFunction:
    """1.0 where the completion is the parts in their tags, with nothing but white space around them, or behind them text where
    the settings want it; else 0.0."""
    # no part contains a tag: each tag occurs once
    tags = "|".join(re.escape(tag) for tag in settings.tags)
    inside = rf"(?:(?!</?(?:{tags})>).)*"
    parts = r"\s*".join(rf"<{re.escape(tag)}>{inside}</{re.escape(tag)}>" for tag in settings.tags)
    behind = rf"(?!</?(?:{tags})>)\S{inside}" if settings.text_after else ""
    pattern = re.compile(rf"\s*{parts}\s*{behind}", re.DOTALL)

    def reward(completions: Completions, **_: Any) -> list[float | None]:
        return [float(pattern.fullmatch(text) is not None) for text in texts_of(completions)]

    return reward


def json_schema_reward(settings: JSONSchemaReward, context: RewardContext) -> RewardFunction:
    """1.0 where the completion is JSON that fits its schema, else 0.0.

    Raises ConfigError without the package `jsonschema`, and for a schema that is none.
    """
    whose = "the reward json_schema"
    common = None if settings.json_schema is None else schema_check(settings.json_schema, whose)

    def reward(completions: Completions, json_schema: Sequence[Any] | None = None, **_: Any) -> list[float | None]:
        schemas = json_schema or [None] * len(completions)
        rewards: list[float | None] = []
        for text, schema in zip(texts_of(completions), schemas, strict=True):
            if settings.fenced and (block := _FENCE.search(text)) is not None:
                text = block[1]
            try:
                value = json.loads(text)
            except (json.JSONDecodeError, RecursionError):
                rewards.append(0.0)
                continue
            check = common
            if check is None and schema is not None:
                check = schema_check(json.loads(schema) if isinstance(schema, str) else schema, whose)
            rewards.append(float(check is None or check(value) is None))
        return rewards

    return reward


def length_reward(settings: LengthReward, context: RewardContext) -> RewardFunction:
    """1 inside the range, falling linearly to 0 at `falloff` tokens beyond it."""

    def of(length: int) -> float:
        beyond = max(settings.at_least - length, 0 if settings.at_most is None else length - settings.at_most, 0)
        return max(0.0, 1 - beyond / settings.falloff)

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        return [of(len(ids)) for ids in completion_ids]

    return reward


def overlong_reward(settings: OverlongReward, context: RewardContext) -> RewardFunction:
    """Soft overlong punishment (DAPO; Yu et al. 2025, eq. 13): 0 for L ≤ Lmax − Lc, then (Lmax − Lc − L) / Lc, at least −1."""
    free = settings.longest - settings.band

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        return [max(-1.0, min(0.0, (free - len(ids)) / settings.band)) for ids in completion_ids]

    return reward


def repetition_reward(settings: RepetitionReward, context: RewardContext) -> RewardFunction:
    """−(1 − different runs / runs) of `run` tokens (Yeo et al. 2025, arXiv 2502.03373); 0 of a shorter completion."""

    def of(ids: Sequence[int]) -> float:
        runs = [tuple(ids[start : start + settings.run]) for start in range(len(ids) - settings.run + 1)]
        return len(set(runs)) / len(runs) - 1 if runs else 0.0

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        return [of(ids) for ids in completion_ids]

    return reward


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
            answered = [(questions[item[place]], [texts[place]]) for place in places]
            for place, (question, _texts), outcome in zip(places, answered, of_name.judge_all(answered), strict=True):
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
        rewards: list[float | None] = []
        for text, given in zip(texts_of(completions), answers, strict=True):
            references = [str(each) for each in (given if isinstance(given, list) else [given]) if each is not None]
            if isinstance(settings.verifier, Numeric):
                references = [each.rpartition("####")[2].strip() for each in references]
            for reference in references:
                refusal = settings.verifier.refusal(reference)
                if refusal is not None:
                    raise ValueError(f"the right answer {reference!r} {refusal}")
            rewards.append(float(settings.verifier.verify(text, references)) if references else None)
        return rewards

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


#: Columns of an episode: the sum of its rewards, and why it broke off.
TOTAL, FAILURE = "environment_total", "environment_failure"
#: Name under which an environment's failures are counted.
ENVIRONMENT = "environment"


def environment_reward(settings: EnvironmentReward, context: RewardContext) -> RewardFunction:
    """The sum of an episode's rewards; none of one that broke off, which the sampler leaves out and counts."""

    def reward(
        completions: Sequence[Any],
        environment_total: Sequence[float] | None = None,
        environment_failure: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float | None]:
        if environment_total is None:
            return [None for _ in completions]
        failures = environment_failure or [""] * len(environment_total)
        return [None if failure else total for total, failure in zip(environment_total, failures, strict=True)]

    return reward
