"""Metrics of a run beside its loss: throughput and model FLOPs utilisation, and accuracy on tasks.

`minutes` becomes a number of steps by a measurement of a few seconds before the first step. Other load on the machine at that
moment makes the number too small, by the factor by which it slowed the measured steps; `ThroughputCheck` detects it in the
first steps of the run.

What asks the tasks is passed in: it lies above this package.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from bessemer.core.errors import ConfigError, StaleMeasurementError
from bessemer.core.stage import OpenTasks, TaskScorer
from bessemer.model.config import ModelConfig
from bessemer.training.config_parts import BatchSettings, ValidationSettings

if TYPE_CHECKING:
    from bessemer.model.decoder import Decoder
    from bessemer.training.trainer import Trainer


#: Beginning of the keys of accuracies on tasks in `metrics.jsonl`; the task's name follows.
TASK = "task/"

#: Weight of the newest step in the moving average that the progress line shows.
_SMOOTHING = 0.1


class Throughput:
    """Throughput of a run's steps. peak_flops: of all its devices together, vendor figure or measured, FLOP/s; None:
    unknown."""

    def __init__(self, config: BatchSettings, model: ModelConfig, peak_flops: float | None) -> None:
        self._flops_per_token = model.flops_per_token(config.context_length)
        self._peak_flops = peak_flops
        #: Moving average of tokens per second.
        self._average = 0.0

    def add_step(self, tokens: int, seconds: float, waited: float) -> dict[str, float]:
        """Metrics of a step of `tokens` that took `seconds`, of which `waited` were spent waiting for data."""
        rate = tokens / seconds
        self._average += _SMOOTHING * (rate - self._average) if self._average else rate
        return {
            "tokens_per_second": round(rate),
            "gflops": round(rate * self._flops_per_token / 1e9, 1),
            **self.utilisation(rate),
            "data_wait": round(waited / seconds, 4),
        }

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """`mfu`: FLOPs of the model over the peak of the devices (Chowdhery et al. 2022, appendix B). Empty where the peak is
        unknown."""
        if self._peak_flops is None:
            return {}
        return {"mfu": round(tokens_per_second * self._flops_per_token / self._peak_flops, 4)}

    def progress_line(self, latest: Mapping[str, Any]) -> str:
        """Text beside the progress bar: loss, bits per byte or loss of the last validation, accuracy on the tasks, of several
        their mean, average throughput."""
        parts = [f"loss {latest['loss']:.3f}"]
        if "bits_per_byte" in latest:
            parts.append(f"{latest['bits_per_byte']:.3f} bits/byte")
        elif "validation_loss" in latest:
            parts.append(f"{latest['validation_loss']:.3f} held out")
        accuracies = {name.removeprefix(TASK): value for name, value in latest.items() if name.startswith(TASK)}
        if accuracies:
            what = next(iter(accuracies)) if len(accuracies) == 1 else f"of {len(accuracies)} tasks"
            parts.append(f"{fmean(accuracies.values()):.1%} {what}")
        parts.append(f"{self._average:,.0f} tokens/s")
        used = self.utilisation(self._average)
        parts.append(f"{used['mfu']:.0%} MFU" if used else f"{self._average * self._flops_per_token / 1e9:,.0f} GFLOP/s")
        return " · ".join(parts)


#: Steps that are not counted: they compile and read cold files.
_FIRST_STEPS = 3
#: A window of steps is judged when it is this long, in seconds and in steps.
_WINDOW_SECONDS, _WINDOW_STEPS = 8.0, 20
#: Ratio between measured and real time of a step that makes a measurement stale.
_STALE = 1.5
#: Fraction of the run in which a throughput above the measured one still restarts it.
_CHECKED_FRACTION = 0.25


class ThroughputCheck:
    """Compares the steps of a run, window by window, with the measured time per step.

    The first window fails when it is faster or slower. Later windows, in the first quarter of the run, fail only when they are
    faster: other load has ended, and more steps fit. A slower one may be other load that will end as well.
    """

    def __init__(self, seconds_per_step: float, steps: int) -> None:
        self._measured = seconds_per_step
        self._last_checked = _CHECKED_FRACTION * steps
        self._count = 0
        self._first = True
        self._window: list[float] = []

    def add_step(self, seconds: float) -> None:
        """Count a step that took `seconds`. Raises StaleMeasurementError when the throughput is not the measured one."""
        self._count += 1
        if self._count <= _FIRST_STEPS or (not self._first and self._count > self._last_checked):
            return
        self._window.append(seconds)
        if len(self._window) < _WINDOW_STEPS or sum(self._window) < _WINDOW_SECONDS:
            return
        actual = median(self._window)
        faster, slower = self._measured / actual, actual / self._measured
        if faster > _STALE or (self._first and slower > _STALE):
            ratio, word = (faster, "less") if faster > 1 else (slower, "more")
            raise StaleMeasurementError(
                f"a step takes {actual * 1000:.0f} ms, {ratio:.1f} times {word} than when this machine was measured"
            )
        self._first = False
        self._window = []


def open_tasks(config: ValidationSettings, folder: Path, opener: OpenTasks | None) -> TaskScorer | None:
    """The tasks of the settings, with their data; None where they name none. Relative paths start from `folder`.

    Raises ConfigError for a task that there is not, and where nothing asks tasks; ArtefactError for data that is missing.
    """
    return opened_tasks(config.tasks, config.tasks_data, config.tasks_limit, folder, opener)


def opened_tasks(
    names: Sequence[str], data: str | None, limit: int, folder: Path, opener: OpenTasks | None
) -> TaskScorer | None:
    """Tasks by name or file, with their data in the folder `data`; relative paths as in, and raises as, `open_tasks`."""
    if not names:
        return None
    if opener is None:
        raise ConfigError("tasks: no function that asks them was passed in; the pipeline passes one")
    placed = [str(folder / name) if name.endswith((".yaml", ".yml")) else name for name in names]
    return opener(placed, None if data is None else folder / data, limit)


def check_processes(processes: int) -> None:
    """Raise ConfigError when tasks are to be asked of a model whose weights several processes share."""
    if processes > 1:
        raise ConfigError(
            f"tasks: asked of a model in one process, and {processes} train this one; leave tasks out, and evaluate its "
            "checkpoints"
        )


class PeriodicTasks:
    """Asks the tasks at the steps that the settings name. It leaves weights, optimizers and the random state as they are."""

    def __init__(self, scorer: TaskScorer, decoder: Decoder, tokenizer: Path, steps: Collection[int]) -> None:
        """decoder: the model, which has its weights when training begins. tokenizer: the folder that holds its tokenizer.
        steps: after which the tasks are asked."""
        self._scorer = scorer
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._steps = steps

    def __call__(self, finished: int, trainer: Trainer) -> dict[str, float]:
        """Accuracies by `task/NAME` after `finished` steps; empty at most steps."""
        if finished not in self._steps:
            return {}
        from bessemer.model.adapters.trained import without_parts_beside

        decoder = without_parts_beside(self._decoder)
        with trainer.runtime.evaluating(decoder):
            accuracies = self._scorer.accuracies(decoder, self._tokenizer)
        return {f"{TASK}{name}": accuracy for name, accuracy in accuracies.items()}
