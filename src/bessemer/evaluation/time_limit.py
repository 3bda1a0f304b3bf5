"""The share of an evaluation that fits its time limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bessemer.core.environment import usable_cores
from bessemer.core.metrics import duration
from bessemer.core.progress import Progress
from bessemer.evaluation.config import EvaluateConfig
from bessemer.training.runtime import faster_threads, thread_candidates

#: Shares of the tokens and questions that one model is timed with; the time of the whole is extrapolated linearly.
_TRIALS = (1 / 16, 1 / 8)
#: Smallest share that is evaluated, whatever the time.
_SMALLEST_SHARE = 1 / 16
#: Seconds below which an evaluation is short; then these are its shares to time, and the smallest share.
_SHORT, _SHORT_TRIALS, _SMALLEST_OF_SHORT = 30.0, (1 / 64, 1 / 32), 1 / 64
#: Most time as a share of the models' training time, and the seconds that are always allowed.
_OF_TRAINING, _LEAST_SECONDS = 0.5, 10.0

#: Evaluates models with settings into a folder.
Evaluate = Callable[[EvaluateConfig, Mapping[str, Path], Path], object]


def within_minutes(
    config: EvaluateConfig,
    models: Mapping[str, Path],
    evaluate: Evaluate,
    progress: Progress,
    *,
    held_out_tokens: int | None = None,
    training_seconds: float | None = None,
) -> tuple[EvaluateConfig, dict[str, Any]]:
    """The settings with as many tokens and questions as fit `minutes`, and the measurement behind them.

    The last model is timed with two small shares: a model costs a + b × share seconds, and the baselines at most as much as a
    model. held_out_tokens: all that could be scored. training_seconds: of the models; evaluation takes half of that at most, so
    that a run of a few steps is not evaluated for minutes.
    """
    minutes, started = config.minutes, time.perf_counter()
    assert minutes is not None
    allowed = math.inf if training_seconds is None else max(_LEAST_SECONDS, _OF_TRAINING * training_seconds)
    is_trial, seconds_left = allowed < 60 * minutes, min(60 * minutes, allowed)
    whole = config
    if held_out_tokens is not None:
        config = config.with_changes(max_tokens=min(held_out_tokens, config.max_tokens or held_out_tokens))
    trials, smallest = (_TRIALS, _SMALLEST_SHARE) if seconds_left >= _SHORT else (_SHORT_TRIALS, _SMALLEST_OF_SHORT)
    name = list(models)[-1]
    if config.threads is None:
        cores = usable_cores()
        threads = faster_threads(cores, thread_candidates(cores))
        config, whole = config.with_changes(threads=threads), whole.with_changes(threads=threads)
    seconds = []
    with progress.task("measure this machine"):
        for share in trials:
            trial = with_share(config, share).with_changes(baselines=[])
            with TemporaryDirectory() as folder:
                begin = time.perf_counter()
                evaluate(trial, {name: models[name]}, Path(folder))
                seconds.append(time.perf_counter() - begin)
    slope = max(0.0, (seconds[1] - seconds[0]) / (trials[1] - trials[0]))
    fixed = max(0.0, seconds[0] - slope * trials[0])
    count = len(models) + bool(config.baselines)
    left = seconds_left - (time.perf_counter() - started)
    share = min(1.0, max(smallest, (left / count - fixed) / slope if slope else 1.0))
    measured = {
        "minutes": seconds_left / 60,
        **({"training_seconds": round(training_seconds or 0.0, 1)} if is_trial else {}),
        "share": round(share, 3),
        "seconds": round(time.perf_counter() - started, 1),
        "trials": seconds,
    }
    if share == 1.0:
        return whole.with_changes(minutes=None), measured
    why = (
        f"in proportion to {duration(training_seconds or 0.0)} of training"
        if is_trial
        else f"which is what {minutes:g} minutes hold here"
    )
    progress.say(f"  {share:.0%} of the tokens and questions, {why}")
    return with_share(config, share), measured


def with_share(config: EvaluateConfig, share: float) -> EvaluateConfig:
    """The settings with a share of the tokens and questions."""
    return config.with_changes(
        minutes=None,
        max_tokens=None if config.max_tokens is None else max(1, round(share * config.max_tokens)),
        questions=max(1, round(share * config.questions)),
    )
