"""Several rewards of the same completions: called within their time, failures counted, added up."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

from bessemer.core.concurrency import call_within
from bessemer.core.errors import BessemerError
from bessemer.core.usercode import is_user_function, load_user_function
from bessemer.posttraining.rewards.config import REWARDS, RewardContext, RewardFunction, RewardSettings

#: Time-outs of single completions in one call after which its other completions are dropped.
_MOST_HANGS = 3

# Shapes: R completions, K rewards.


class RewardError(BessemerError):
    """None of a rollout's completions has a reward."""


@dataclass(frozen=True)
class Completed:
    """Completions to be judged. completions: texts, or messages where prompts are messages. columns: of the data, (R,) each."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def part(self, places: slice) -> Completed:
        """The completions of a slice."""
        return Completed(
            self.prompts[places],
            self.completions[places],
            self.completion_ids[places],
            {name: values[places] for name, values in self.columns.items()},
        )

    @property
    def of_prompts(self) -> list[slice]:
        """The places of each run of completions of one prompt."""
        begins = [place for place, prompt in enumerate(self.prompts) if not place or prompt != self.prompts[place - 1]]
        return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(self.prompts)], strict=True)]


@dataclass(frozen=True)
class Judgement:
    """values: (K, R), None where a reward does not judge a completion, or failed. totals: (R,), the weighted sum of those that
    judge; NaN where one failed or none judges. failures: completions by reward and reason. extra: columns that a reward logged,
    (R,). metrics: values that it logged.
    """

    values: Sequence[Sequence[float | None]]
    totals: Sequence[float]
    failures: Mapping[tuple[str, str], int]
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    metrics: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass
class _Logged:
    """Values that a reward logs in one call, by TRL's `log_extra` and `log_metric`, which may be called for each row."""

    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, given: Sequence[Any]) -> None:
        self.extra.setdefault(column, []).extend(given)

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def take(self, other: _Logged) -> None:
        """Add what another call logged."""
        for column, given in other.extra.items():
            self.log_extra(column, given)
        for name, values in other.metrics.items():
            self.metrics.setdefault(name, []).extend(values)


class Judge:
    """Rewards of a run, under names of their own."""

    def __init__(self, settings: Sequence[RewardSettings], context: RewardContext) -> None:
        """Raises ConfigError for a function that cannot be loaded and for a reward that this machine cannot give."""
        self._settings = settings
        self._functions = [_function(each, context) for each in settings]
        self.names = _names(settings)
        self.weights = [each.weight for each in settings]

    def judge(self, completed: Completed, *, step: int = 0, steps: int = 0) -> Judgement:
        """Rewards of completions. step, steps: finished and all steps, for functions that read `trainer_state`."""
        values: list[list[float | None]] = []
        failures: Counter[tuple[str, str]] = Counter()
        failed: set[int] = set()
        logged = _Logged()
        state = SimpleNamespace(global_step=step, max_steps=steps, epoch=None)
        for name, settings, function in zip(self.names, self._settings, self._functions, strict=True):
            rewards, reasons = _judged(function, completed, state, settings.seconds, logged)
            values.append(rewards)
            failed |= reasons.keys()
            failures.update((name, reason) for reason in reasons.values())
        totals = [
            math.nan if place in failed else _total([of_reward[place] for of_reward in values], self.weights)
            for place in range(len(completed.completions))
        ]
        extra = {name: each for name, each in logged.extra.items() if len(each) == len(totals)}
        return Judgement(values, totals, failures, extra, logged.metrics)


def _total(values: Sequence[float | None], weights: Sequence[float]) -> float:
    known = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    return sum(known) if known else math.nan


def _names(settings: Sequence[RewardSettings]) -> list[str]:
    names: list[str] = []
    for each in settings:
        name = each.reward.rpartition(":")[2]
        number = sum(other == name or other.startswith(f"{name}_") for other in names)
        names.append(f"{name}_{number + 1}" if name in names else name)
    return names


def _function(settings: RewardSettings, context: RewardContext) -> RewardFunction:
    if not is_user_function(settings.reward):
        return REWARDS.find(settings.reward).load()(settings, context)
    function = load_user_function(settings.reward, context.folder)
    return partial(_called, function)


def _called(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a user's function with the arguments that it takes; TRL's take all, by `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        arguments = {parameter.name: arguments[parameter.name] for parameter in parameters if parameter.name in arguments}
    given = function(**arguments)
    return asyncio.run(given) if inspect.iscoroutine(given) else given


def _judged(
    function: RewardFunction, completed: Completed, state: Any, seconds: float, logged: _Logged
) -> tuple[list[float | None], dict[int, str]]:
    """A reward's values, and why it failed by place.

    All completions at once; where that fails, prompt by prompt, since a function may compare the completions of one; and one by
    one those of a prompt for which it fails again.
    """
    count = len(completed.completions)
    try:
        values = _values(function, completed, state, seconds, logged)
    except Exception as error:  # a user's function may raise anything
        if count == 1:
            return [None], {0: _reason(error)}
    else:
        return [None if _bad(value) else value for value in values], {
            place: "gave a value that is not finite" for place, value in enumerate(values) if _bad(value)
        }
    parts = completed.of_prompts
    if len(parts) == 1:
        parts = [slice(place, place + 1) for place in range(count)]
    rewards: list[float | None] = []
    reasons: dict[int, str] = {}
    for part in parts:
        if sum(reason.startswith(TimeoutError.__name__) for reason in reasons.values()) >= _MOST_HANGS:
            rewards += [None] * (part.stop - part.start)
            reasons |= dict.fromkeys(range(part.start, part.stop), "not asked, since others took too long")
            continue
        of_part, failed = _judged(function, completed.part(part), state, seconds, logged)
        rewards += of_part
        reasons |= {part.start + place: reason for place, reason in failed.items()}
    return rewards, reasons


def _values(function: RewardFunction, completed: Completed, state: Any, seconds: float, logged: _Logged) -> list[float | None]:
    of_call = _Logged()
    arguments = {
        **completed.columns,
        "trainer_state": state,
        "log_extra": of_call.log_extra,
        "log_metric": of_call.log_metric,
        "prompts": list(completed.prompts),
        "completions": list(completed.completions),
        "completion_ids": list(completed.completion_ids),
    }
    given = list(call_within(seconds, lambda: function(**arguments)))
    if len(given) != len(completed.completions):
        raise ValueError(f"gave {len(given)} values for {len(completed.completions)} completions")
    values = [None if value is None else float(value) for value in given]
    logged.take(of_call)
    return values


def _bad(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _reason(error: Exception) -> str:
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
