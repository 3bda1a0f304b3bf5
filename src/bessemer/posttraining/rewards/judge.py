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

from bessemer.core.errors import BessemerError
from bessemer.core.time_limit import call_within
from bessemer.core.usercode import is_user_function, load_user_function
from bessemer.posttraining.rewards.config import RewardSettings
from bessemer.posttraining.rewards.registry import REWARDS, RewardContext, RewardFunction

#: Completions of one call whose reward may take too long one by one; the others of that call are dropped unasked.
_MOST_HANGS = 3

# Shapes: R completions, K rewards.


class RewardError(BessemerError):
    """A reward gave none of the completions a number."""


@dataclass(frozen=True)
class Completed:
    """Completions to be judged. completions: texts, or messages where prompts are messages. columns: of the data, (R,) each."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def one(self, place: int) -> Completed:
        """One of them."""
        return Completed(
            [self.prompts[place]],
            [self.completions[place]],
            [self.completion_ids[place]],
            {name: [values[place]] for name, values in self.columns.items()},
        )


@dataclass(frozen=True)
class Judgement:
    """values: (K, R), None where a reward does not judge a completion, or failed. totals: (R,), the weighted sum of those that
    judge; NaN where one failed or none judges. failures: completions by reward and reason. extra: columns that a reward logged.
    """

    values: Sequence[Sequence[float | None]]
    totals: Sequence[float]
    failures: Mapping[tuple[str, str], int]
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class Judge:
    """Rewards of a run, under names of their own."""

    def __init__(self, settings: Sequence[RewardSettings], context: RewardContext) -> None:
        """Raises ConfigError for a function that cannot be loaded and for a reward that this machine cannot give."""
        self._settings = settings
        self._functions = [_function(each, context) for each in settings]
        self.names = _names(settings)
        self.weights = [each.weight for each in settings]

    def judge(self, completed: Completed, *, step: int = 0, steps: int = 0) -> Judgement:
        """What completions are worth. step, steps: finished, and in all, for functions that ask `trainer_state`.

        Raises RewardError where a reward fails for each of several completions.
        """
        values: list[list[float | None]] = []
        failures: Counter[tuple[str, str]] = Counter()
        failed: set[int] = set()
        extra: dict[str, list[Any]] = {}
        state = SimpleNamespace(global_step=step, max_steps=steps, epoch=None)
        tools = {
            "trainer_state": state,
            "log_extra": lambda column, given: extra.__setitem__(column, list(given)),
            "log_metric": lambda name, value: None,
        }
        for name, settings, function in zip(self.names, self._settings, self._functions, strict=True):
            found, reasons = _judged(function, completed, tools, settings.seconds)
            if len(reasons) == len(found) > 1:
                raise RewardError(f"the reward {name} fails for every completion: {next(iter(reasons.values()))}")
            values.append(found)
            failed |= reasons.keys()
            failures.update((name, reason) for reason in reasons.values())
        totals = [
            math.nan if place in failed else _total([of_reward[place] for of_reward in values], self.weights)
            for place in range(len(completed.completions))
        ]
        return Judgement(values, totals, failures, {name: each for name, each in extra.items() if len(each) == len(totals)})


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
    function: RewardFunction, completed: Completed, tools: Mapping[str, Any], seconds: float
) -> tuple[list[float | None], dict[int, str]]:
    """A reward's values, and why it failed by place. All completions at once; where that fails, one by one."""
    count = len(completed.completions)
    try:
        values = _values(function, completed, tools, seconds)
    except Exception as error:  # anything a user's function may raise
        if count == 1:
            return [None], {0: _reason(error)}
    else:
        return [None if _bad(value) else value for value in values], {
            place: "gave a value that is not finite" for place, value in enumerate(values) if _bad(value)
        }
    found: list[float | None] = []
    reasons: dict[int, str] = {}
    hangs = 0
    for place in range(count):
        if hangs >= _MOST_HANGS:
            found.append(None)
            reasons[place] = "not asked, since others took too long"
            continue
        (value,), failed = _judged(function, completed.one(place), tools, seconds)
        found.append(value)
        if failed:
            reasons[place] = failed[0]
            hangs += failed[0].startswith(TimeoutError.__name__)
    return found, reasons


def _values(function: RewardFunction, completed: Completed, tools: Mapping[str, Any], seconds: float) -> list[float | None]:
    arguments = {
        **completed.columns,
        **tools,
        "prompts": list(completed.prompts),
        "completions": list(completed.completions),
        "completion_ids": list(completed.completion_ids),
    }
    given = list(call_within(seconds, lambda: function(**arguments)))
    if len(given) != len(completed.completions):
        raise ValueError(f"gave {len(given)} values for {len(completed.completions)} completions")
    return [None if value is None else float(value) for value in given]


def _bad(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _reason(error: Exception) -> str:
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
