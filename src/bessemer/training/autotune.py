"""Autotuning before the first step: dtype, compilation, and the number of steps that fit a time.

Real steps are timed: the best of three groups counts, and nothing is chosen where the groups spread over 30 %, because one
other busy process can slow a step tenfold. Dtypes in which this machine multiplies more slowly than in float32 are not tried.
The processes of a job time them together, each its own rows, in the layout of the run; rank 0 decides. Choices are written to
`autotune.json` before step 0 and read back on resume.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.core.environment import usable_cores
from bessemer.core.errors import ConfigError
from bessemer.core.metrics import METRICS, duration, read_metrics
from bessemer.core.progress import Progress, Silent
from bessemer.core.store import read_json, write_json
from bessemer.distributed.mesh import Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.device import check_dtype, choose_device, is_fast, slower_than_processor
from bessemer.model.storage.model_config import read_decoder_config
from bessemer.training.config import LoopConfig, check_compiler
from bessemer.training.config_parts import VALIDATIONS
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime, faster_threads, thread_candidates
from bessemer.training.starting_model import StartingModel
from bessemer.training.step_timing import StepTiming, agreed, measure_steps

AUTOTUNE = "autotune.json"
#: Compiling is tried when the run without it lasts longer than this: it takes about 25 s, and saves up to a third of the run.
_SECONDS_WORTH_COMPILING = 120.0
#: Steps of the short run that times a stage's own step.
_TRIAL_STEPS = 3
#: Cost of validation, a forward pass without gradients, as a fraction of a training step on as many tokens.
_VALIDATION_COST = 0.4

SomeConfig = TypeVar("SomeConfig", bound=LoopConfig)


class CompilerError(Exception):
    """Compiling fails on a process of a job; raised on all of its processes."""


@dataclass(frozen=True)
class RunCost:
    """What a run costs besides its steps, for a run whose steps are cut when they do not fit `minutes`.

    validation_tokens: read in each validation. forward_tokens: read once, without gradients, before the first step.
    seconds_per_step: of the stage's own steps, where they cost more than a forward and a backward pass; None: those are timed.
    """

    validation_tokens: int = 0
    forward_tokens: int = 0
    seconds_per_step: Callable[[Any], float] | None = None


class SettingsResolvedError(Exception):
    """Raised instead of training where only the settings are wanted; holds them and their measurements."""

    def __init__(self, config: LoopConfig, measured: dict[str, Any]) -> None:
        super().__init__("settings are resolved")
        self.config = config
        self.measured = measured


def resolve(
    config: SomeConfig,
    model: Path,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    folder: Path = Path(),
    cost: RunCost | None = None,
) -> tuple[SomeConfig, dict[str, Any]]:
    """The settings with steps, dtype and compile explicit, and the measurements that they come from.

    Returns them unchanged, with `{}`, when nothing is open. Every process of a job calls this and gets the same. A user's own
    functions lie below `folder`. cost: of a stage whose `steps` are the most that it makes. Raises ConfigError when the model
    cannot read rows of `context_length`, the settings do not fit the number of processes, or they name a dtype that is much
    slower here than float32.
    """
    mesh = _checked_mesh(config, model, choose_device(device))
    return _resolved(config, model, mesh, choose_device(device), progress=progress, folder=folder, cost=cost)


#: Most rows of the products that a Mac's GPU is timed by.
_MOST_TIMED_ROWS = 4096


def _checked_mesh(config: LoopConfig, model: Path, device: torch.device) -> Mesh:
    """The mesh of a run whose settings suit the model and the device. Raises as `resolve`.

    Every process checks all, so that none waits for one that a mistake has stopped.
    """
    mesh = Mesh.here(config.parallel, device.type)
    StartingModel.of(model, config, seed=0).check(mesh)
    check_fits(config, read_decoder_config(model))
    check_dtype(config.dtype, device)
    return mesh


def _resolved(
    config: SomeConfig,
    model: Path,
    mesh: Mesh,
    chosen_device: torch.device,
    *,
    progress: Progress | None,
    folder: Path,
    cost: RunCost | None,
) -> tuple[SomeConfig, dict[str, Any]]:
    """`resolve` of settings that were checked."""
    if isinstance(config, PretrainConfig) and config.tokens is not None:
        rows = -(-config.tokens // config.context_length)
        config = config.with_changes(steps=config.batch_sizes.steps_for(rows), tokens=None)
    if config.resolved:
        return config, {}
    progress = progress if progress is not None and mesh.leads else Silent()
    started = time.perf_counter()
    threads = config.threads
    if threads == "auto" and chosen_device.type == "cpu" and mesh.alone:
        threads = faster_threads(usable_cores(), thread_candidates(usable_cores()))
    short = config.with_changes(**_of_length(config, 1), batch_size_warmup=None, threads=threads)
    with progress.task("measure this machine") as task:

        def measure(dtype: str, compiled: bool) -> StepTiming:
            task.advance(0, f"{dtype}{', compiled' if compiled else ''}")
            if compiled and config.compile == "auto" and not mesh.alone:
                _check_compiling(chosen_device, mesh)
            return measure_steps(short.with_changes(dtype=dtype, compile=compiled), model, chosen_device, folder, mesh)

        dtypes = agreed(_dtypes(config, chosen_device), mesh)
        speed, speeds, reason = _timed(config, measure, dtypes, cost or RunCost(), alone=mesh.alone)
    steps, planned = config.steps, None
    if config.time_limit is not None:
        small = None
        if config.batch_size_warmup is not None:
            full = short.with_changes(dtype=speed.dtype, compile=speed.compile)
            first = full.with_changes(batch_size=config.batch_size_warmup.start)
            small = measure_steps(first, model, chosen_device, folder, mesh)
        fitting = config.shortest_from(_steps_in_time(config, speed, time.perf_counter() - started, small, cost))
        if steps is None or fitting < steps:
            steps, planned = fitting, steps
    tokens_per_step = config.batch_size * config.context_length
    resolved = config.with_changes(**_explicit(config, speed.dtype, speed.compile, steps))
    measured = {
        "reason": reason,
        "arithmetic": torch.backends.cpu.get_cpu_capability() if chosen_device.type == "cpu" else str(chosen_device),
        "seconds": round(time.perf_counter() - started, 1),
        "tokens_per_second": round(tokens_per_step / speed.typical),
        "gflops": round(
            read_decoder_config(model).flops_per_token(config.context_length) * tokens_per_step / speed.best / 1e9, 1
        ),
        **({} if planned is None else {"steps": steps, "planned_steps": planned, "minutes": config.time_limit}),
        "candidates": [asdict(candidate) for candidate in speeds],
    }
    most = "at most " if config.batch_size_warmup is not None else ""
    length = f"{steps:,} steps of {most}{tokens_per_step:,} tokens in " if steps else ""
    if planned is not None:
        length = f"{steps:,} of {planned:,} steps, which is what {config.time_limit:g} minutes hold here, in "
    progress.say(f"  {length}{speed.dtype}{', compiled' if speed.compile else ''}: {reason}")
    return agreed((resolved, measured), mesh)


def _timed(
    config: LoopConfig, measure: Callable[[str, bool], StepTiming], dtypes: list[str], cost: RunCost, *, alone: bool
) -> tuple[StepTiming, list[StepTiming], str]:
    """`choose`; the seconds of a step are the stage's own, where its cost has them and there is a limit of time."""
    own = None if config.time_limit is None else cost.seconds_per_step
    if own is not None and len(dtypes) == 1 and config.compile is False:
        # dtype and compilation are given: only the time is missing
        speed = StepTiming(dtypes[0], False, (own(config.with_changes(minutes=None)),), 0.0)
        return speed, [speed], f"{speed.best * 1000:.0f} ms a step"
    # in a job only an error that all processes raise is caught: otherwise the others would wait in a collective
    speed, speeds, reason = choose(config, measure, dtypes, failures=Exception if alone else CompilerError)
    if own is not None:
        chosen = config.with_changes(dtype=speed.dtype, compile=speed.compile, minutes=None)
        speed = replace(speed, groups=(own(chosen),))
    return speed, speeds, reason


def _check_compiling(device: torch.device, mesh: Mesh) -> None:
    """Raise CompilerError on every process when the smallest of functions does not compile on one of them.

    In a compiled step, an error on one process would leave the others in a collective.
    """
    problem = ""
    try:
        torch.compile(_increased)(torch.zeros(1, device=device))
    except Exception as error:
        # a missing or broken C++ compiler makes PyTorch raise errors of many types
        problem = str(error) or type(error).__name__
    if mesh.any(bool(problem))[0]:
        raise CompilerError(problem or "on another process")


def _increased(values: Tensor) -> Tensor:
    return values + 1


def choose(
    config: LoopConfig,
    measure: Callable[[str, bool], StepTiming],
    dtypes: list[str],
    *,
    failures: type[Exception] = Exception,
) -> tuple[StepTiming, list[StepTiming], str]:
    """The fastest of the open choices, all timings, and the reason in words.

    `measure` times steps under a dtype, compiled or not. Without a steady measurement the first of `dtypes`, eager, is chosen.
    Compiling is chosen when the time it saves over the run, from steps timed one after the other, exceeds the time it takes.
    failures: errors of a compiled measurement after which the run stays eager.
    """
    if config.compile is True:
        speeds = [measure(dtype, True) for dtype in dtypes]
    else:
        speeds = [measure(dtype, False) for dtype in dtypes]
    if not all(speed.steady for speed in speeds):
        spread = max(max(speed.groups) / speed.best - 1 for speed in speeds)
        return (
            speeds[0],
            speeds,
            f"other work disturbs this machine (times spread by {spread:.0%}), so nothing was decided by them",
        )
    best = min(speeds, key=lambda speed: speed.best)
    reason = f"{best.best * 1000:.0f} ms a step" + "".join(
        f", {speed.best * 1000:.0f} in {speed.dtype}" for speed in speeds if speed is not best
    )
    run_seconds = _run_seconds(config, best)
    if config.compile != "auto" or config.parallel.splits_backward or run_seconds < _SECONDS_WORTH_COMPILING:
        return best, speeds, reason
    try:
        compiled = measure(best.dtype, True)
    except failures as error:
        # a missing or broken C++ compiler makes PyTorch raise errors of many types
        what = next(iter(str(error).strip().splitlines()), "")[:200]
        return best, speeds, f"{reason}; compiling does not work here ({type(error).__name__}: {what})"
    # measured again: the load of a shared machine may have changed during compilation
    eager = measure(best.dtype, False)
    speeds += [compiled, eager]
    if not (compiled.steady and eager.steady):
        return best, speeds, f"{reason}; compiled steps are disturbed by other work, so eager"
    saved = _run_seconds(config, eager) * (1 - compiled.best / eager.best)
    verdict = f"compiling takes {duration(compiled.first)} and saves {duration(max(saved, 0.0))}"
    return (compiled if saved > compiled.first else eager), speeds, f"{reason}; {verdict}"


def prepare_run(
    config: SomeConfig,
    model: Path,
    out: Path,
    *,
    device: str,
    progress: Progress,
    folder: Path = Path(),
    cost: RunCost | None = None,
    only_resolve: bool = False,
) -> tuple[SomeConfig, Runtime, Mesh]:
    """Resolved settings, runtime and mesh of a run in `out`: those of its `autotune.json`, or new ones, which all processes
    measure and rank 0 writes.

    cost: as in `resolve`. only_resolve: raise SettingsResolvedError, and write nothing. On resume, reports when the machine,
    the threads or PyTorch differ, since the rest is then not bit-exact.
    """
    chosen_device = choose_device(device)
    mesh = _checked_mesh(config, model, chosen_device)
    rows, width = min(config.batch_size * config.context_length, _MOST_TIMED_ROWS), read_decoder_config(model).hidden_size
    if slow := slower_than_processor(chosen_device, rows, width, torch.float32):
        progress.say(slow)
    measured_settings = partial(_resolved, config, model, mesh, chosen_device, progress=progress, folder=folder, cost=cost)
    if only_resolve:
        raise SettingsResolvedError(*measured_settings())
    if not agreed((out / AUTOTUNE).exists(), mesh):
        resolved, measured = measured_settings()
        if mesh.leads:
            runtime = Runtime.of(resolved, chosen_device, processes=mesh.processes_here)
            if runtime.adapts_threads:
                runtime = replace(runtime, threads=faster_threads(runtime.threads, thread_candidates(usable_cores())))
            write_json(out / AUTOTUNE, {"steps": resolved.steps, **asdict(runtime), "measured": measured})
        mesh.wait()
    return *_read_choices(config, out, chosen_device, progress, mesh), mesh


def _read_choices(
    config: SomeConfig, out: Path, device: torch.device, progress: Progress, mesh: Mesh
) -> tuple[SomeConfig, Runtime]:
    """The settings and the runtime of a run in `out`, by its `autotune.json`."""
    place = out / AUTOTUNE
    written = read_json(place, "record of a run's start")
    if not config.resolved:
        config = config.with_changes(**_explicit(config, written["dtype"], written["compile"], written["steps"]))
    check_dtype(config.dtype, device)
    runtime = Runtime.of(config, device, written["threads"], mesh.processes_here)
    changed = [name for name in ("device", "threads", "processor", "torch_version") if getattr(runtime, name) != written[name]]
    if changed:
        was = ", ".join(f"{name} {written[name]} → {getattr(runtime, name)}" for name in changed)
        progress.say(f"  resumed with another {was}: the rest is not bit-exact with an uninterrupted run")
    return config, runtime


def check_fits(config: LoopConfig, model_config: ModelConfig) -> None:
    """Raise ConfigError when the model cannot read rows of `context_length`, or compiling is asked for and cannot be done."""
    if config.compile is True:
        check_compiler()
    if config.context_length > model_config.max_position_embeddings:
        raise ConfigError(
            f"context_length {config.context_length:,} exceeds the model's max_position_embeddings "
            f"{model_config.max_position_embeddings:,}; lower the one or raise the other"
        )


def _explicit(config: LoopConfig, dtype: str, compiled: bool | str, steps: int | None) -> dict[str, Any]:
    lengths: dict[str, Any] = {"minutes": None} if "minutes" in type(config).model_fields else {}
    if isinstance(config, PretrainConfig):
        lengths["tokens"] = None
    return {"dtype": dtype, "compile": compiled, "steps": steps, **lengths}


def _of_length(config: LoopConfig, steps: int) -> dict[str, Any]:
    """Changes of settings for a short run, without warm-up and decay."""
    changes = _explicit(config, config.dtype, config.compile, steps)
    changes |= {"warmup_fraction": 0.0, "warmup_steps": None, "warmup_tokens": None}
    if config.schedule == "wsd":
        changes |= {"decay_fraction": 0.0, "decay_steps": None, "decay_tokens": None}
    return changes


def _dtypes(config: LoopConfig, device: torch.device) -> list[str]:
    if config.dtype != "auto":
        return [config.dtype]
    return ["float32", "bfloat16"] if is_fast(torch.bfloat16, device) else ["float32"]


def _run_seconds(config: LoopConfig, speed: StepTiming) -> float:
    if config.steps is None:
        return 60 * (config.time_limit or 0.0)
    return min(config.steps * speed.best, 60 * (config.time_limit or math.inf))


def _steps_in_time(
    config: LoopConfig, speed: StepTiming, spent: float, small: StepTiming | None = None, cost: RunCost | None = None
) -> int:
    """Steps that fit the time limit, less `spent` seconds and the time of validation and diagnostics.

    small: of the smallest batches of a warm-up. The time of a step is taken to be linear in its rows between the two.
    """
    assert config.time_limit is not None
    cost = cost or RunCost(config.evaluate_tokens if isinstance(config, PretrainConfig) else 0)
    # with a fixed interval, validation is counted per step below
    validations = VALIDATIONS if config.evaluate_every is None else 0
    second_per_token = speed.typical / (config.batch_size * config.context_length)
    validation = _VALIDATION_COST * second_per_token * cost.validation_tokens

    def with_extras(seconds: float) -> float:
        seconds_with = seconds + (validation / config.evaluate_every if config.evaluate_every else 0.0)
        if config.diagnostics_every:
            # one more forward pass of the batch
            seconds_with += _VALIDATION_COST * seconds / config.diagnostics_every
        return seconds_with

    left = config.time_limit * 60 - spent - validations * validation
    left -= _VALIDATION_COST * second_per_token * cost.forward_tokens
    steps, stages = 0, config.batch_sizes.stages
    for rows, count in stages:
        assert small is not None
        share = (rows - stages[0].rows) / (config.batch_size - stages[0].rows)
        each = with_extras(small.typical + share * (speed.typical - small.typical))
        if left < count * each:
            return max(1, steps + int(left / each))
        left, steps = left - count * each, steps + count
    return max(1, steps + int(left / with_extras(speed.typical)))


def seconds_per_step(run: Callable[[Any, Path], object], config: LoopConfig, *, cycle: int = 1) -> float:
    """Seconds of a step of a stage whose steps are more than a forward and a backward pass, by a short run of it.

    run: the stage, of settings and a folder, which is removed afterwards. cycle: steps after which its work repeats. The first
    cycle, which loads and compiles, is not counted. Raises ConfigError in several processes.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError("minutes: this stage's steps are measured in one process; give steps instead")
    counted = cycle * -(-_TRIAL_STEPS // cycle)
    quiet: dict[str, Any] = {
        "log_every": 1,
        "diagnostics_every": 0,
        "checkpoint_every": None,
        "tasks": [],
        "track": [],
        "profile": None,
    }
    if config.comparison is not None:
        quiet["keep_better"] = None
    with TemporaryDirectory() as folder:
        run(config.with_changes(**_of_length(config, cycle + counted), **quiet), Path(folder))
        seconds = [line["seconds"] for line in read_metrics(Path(folder) / METRICS)]
    return (seconds[-1] - seconds[cycle - 1]) / counted
