"""How much of an evaluation fits the time that its settings allow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bessemer.core.environment import usable_cores
from bessemer.core.progress import Progress
from bessemer.evaluation.config import EvaluateConfig
from bessemer.training.threads import faster_threads, thread_candidates

#: Shares of the tokens and questions that are tried with one model, from which the whole is extended in a line.
_TRIALS = (1 / 16, 1 / 8)
#: Smallest share that is evaluated, whatever the time.
_SMALLEST_SHARE = 1 / 16

#: Evaluates models with settings into a folder.
Evaluate = Callable[[EvaluateConfig, Mapping[str, Path], Path], object]


def within_minutes(
    config: EvaluateConfig, models: Mapping[str, Path], evaluate: Evaluate, progress: Progress
) -> tuple[EvaluateConfig, dict[str, Any]]:
    """The settings with as many tokens and questions as fit `minutes`, and the measurement that they come from.

    The last model is evaluated with two small shares, and without baselines, whose time is that of one model's whole share at
    most; a model costs a + b × share seconds.
    """
    minutes = config.minutes
    assert minutes is not None
    started = time.perf_counter()
    name = list(models)[-1]
    if config.threads is None:
        cores = usable_cores()
        config = config.with_changes(threads=faster_threads(cores, thread_candidates(cores)))
    seconds = []
    with progress.task("measure this machine"):
        for share in _TRIALS:
            trial = with_share(config, share).with_changes(baselines=[])
            with TemporaryDirectory() as folder:
                begin = time.perf_counter()
                evaluate(trial, {name: models[name]}, Path(folder))
                seconds.append(time.perf_counter() - begin)
    slope = max(0.0, (seconds[1] - seconds[0]) / (_TRIALS[1] - _TRIALS[0]))
    fixed = max(0.0, seconds[0] - slope * _TRIALS[0])
    count = len(models) + bool(config.baselines)
    left = 60 * minutes - (time.perf_counter() - started)
    share = min(1.0, max(_SMALLEST_SHARE, (left / count - fixed) / slope if slope else 1.0))
    measured = {
        "minutes": minutes,
        "share": round(share, 3),
        "seconds": round(time.perf_counter() - started, 1),
        "trials": seconds,
    }
    if share == 1.0:
        return config.with_changes(minutes=None), measured
    progress.say(f"  {share:.0%} of the tokens and questions, which is what {minutes:g} minutes hold here")
    return with_share(config, share), measured


def with_share(config: EvaluateConfig, share: float) -> EvaluateConfig:
    """The settings with a share of the tokens and questions."""
    return config.with_changes(
        minutes=None,
        max_tokens=None if config.max_tokens is None else max(1, round(share * config.max_tokens)),
        questions=max(1, round(share * config.questions)),
    )
