"""The training loop, shared by pretraining and fine-tuning, which differ in their batches and their objective.

The state after step n depends only on the settings, the data and the seed: a run that is killed at any moment and resumed ends
with the same weights, bit for bit, as an uninterrupted one; on another number of processes, up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.hashing import hash_value
from bessemer.core.interrupts import DeferredInterrupts
from bessemer.core.metrics import MetricsLog, Tracker, read_metrics
from bessemer.core.progress import Progress, Silent
from bessemer.core.seeds import derive_seed
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.decoder import Decoder
from bessemer.training.checkpoint.manager import CHECKPOINTS, CheckpointManager
from bessemer.training.checkpoint.state import AVERAGE, Stateful, TrainingState
from bessemer.training.config import LoopConfig
from bessemer.training.data.batches import BatchSource
from bessemer.training.data.prefetch import Prefetcher
from bessemer.training.model_setup import prepare_model
from bessemer.training.moe_losses import routing_metrics
from bessemer.training.monitoring.diagnostics import Diagnostics
from bessemer.training.monitoring.profiler import StepProfiler
from bessemer.training.monitoring.throughput import Throughput
from bessemer.training.monitoring.throughput_check import ThroughputCheck
from bessemer.training.monitoring.trackers import open_trackers
from bessemer.training.objectives import Objective, build_objective
from bessemer.training.optim.build import build_optimizers, scale_learning_rates
from bessemer.training.optim.lr_schedule import learning_rate_factor
from bessemer.training.optim.mup import width_ratio
from bessemer.training.optim.weight_averaging import MovingAverage
from bessemer.training.outlier_steps import OutlierDetector
from bessemer.training.runtime import Runtime
from bessemer.training.train_step import StepResult, TrainStep

METRICS = "metrics.jsonl"
#: Keys of a line of metrics that describe one step and not the whole run, as keys with a slash do.
_STEP_METRICS = {"step", "learning_rate", "gradient_norm", "gflops", "peak_memory_bytes"}


class DivergenceError(BessemerError):
    """The loss or the gradient is no longer finite."""


def train(
    model: Decoder,
    batches: BatchSource,
    config: LoopConfig,
    out: Path,
    *,
    runtime: Runtime,
    seed: int,
    objective: Objective | None = None,
    on_step_end: Callable[[int, TrainStep], dict[str, float]] = lambda finished, step: {},
    progress: Progress | None = None,
    description: str = "train",
    mesh: Mesh = ALONE,
    checkpoint_source: Path | None = None,
    folder: Path = Path(),
    peak_flops: float | None = None,
    throughput_check: ThroughputCheck | None = None,
) -> dict[str, Any]:
    """Train `model` in place for `config.steps` steps, resuming from the newest checkpoint in `out`.

    Writes `metrics.jsonl` and `checkpoints/` below `out`. Under a mesh every process calls this, on a shared disk, and the last
    checkpoint holds the whole weights. Returns the headline metrics.

    objective: a user's own instead of the one of the settings. on_step_end: called after each step with the number of finished
    steps and the `TrainStep`; the metrics that it returns (validation) go into that step's line. checkpoint_source: a
    checkpoint of another run, whose weights, optimizer states and step this run starts from. folder: where a user's own
    functions lie. peak_flops: of one process's device, FLOP/s (`device_peak`). throughput_check: receives the seconds of each
    step; an error that it raises ends the run.

    Ctrl-C and SIGTERM save a checkpoint at the end of the step before they take effect. Raises DivergenceError when the
    gradient is no longer finite, CheckpointError when the checkpoints are of another run, StorageError when the disk is full.
    """
    assert config.resolved and config.steps is not None
    progress = progress if progress is not None and mesh.leads else Silent()
    steps = config.steps
    diagnostics = Diagnostics(model, config, mesh)
    throughput = Throughput(config, model.config, None if peak_flops is None else peak_flops * mesh.layout.world_size)
    identity = {
        "model": hash_value(model.config.output_settings()),
        "optimizer": config.optimizer,
        "configuration": hash_value([config.output_settings(), model.config.output_settings(), seed]),
        "data": batches.fingerprint,
    }
    with runtime.running(), DeferredInterrupts() as interrupts:
        torch.manual_seed(derive_seed(seed, "training"))
        model, pipeline = prepare_model(model, config, runtime, mesh)
        optimizers = build_optimizers(model, config, folder, width=width_ratio(config, model.config))
        average = None if config.ema is None else MovingAverage(model, config.ema)
        step = TrainStep(
            model,
            optimizers,
            objective or build_objective(config),
            runtime,
            gradient_clip=config.gradient_clip,
            micro_batch_size=config.micro_batch_size,
            mesh=mesh,
            pipeline=pipeline,
            average=average,
        )
        outliers = OutlierDetector()
        others: dict[str, Stateful] = {"outliers": outliers, "loss_scale": step.scale}
        state = TrainingState(model, optimizers, others if average is None else others | {AVERAGE: average})
        on_gpu = torch.device(runtime.device).type == "cuda"
        background = on_gpu
        if config.checkpoint_background != "auto":
            background = config.checkpoint_background
        checkpoints = CheckpointManager(
            out / CHECKPOINTS, identity, progress, mesh=mesh, keep_every=config.checkpoint_every, background=background
        )
        if checkpoints.restore(state):
            progress.say(f"  resuming from step {state.step:,} of {steps:,}")
        elif checkpoint_source is not None:
            missing = checkpoints.load_from(checkpoint_source, state)
            if average is not None and AVERAGE in missing:
                average.restart()
            progress.say(f"  resuming from step {state.step:,} of {checkpoint_source}, to {steps:,}")
            if state.step >= steps:
                raise ConfigError(f"init_from: {checkpoint_source} is at step {state.step:,}; steps must be larger")
        saved_at = time.monotonic()
        trackers = _trackers(config, out, state.step, progress) if mesh.leads else []
        with (
            MetricsLog(out / METRICS, state.step or None, writes=mesh.leads, trackers=trackers) as metrics,
            progress.task(description, total=steps, unit="steps", completed=state.step) as task,
            Prefetcher(partial(step.read, batches), range(state.step, steps), pin=on_gpu) as prefetcher,
            StepProfiler(config.profile, out, mesh) as profiler,
        ):
            latest = _latest_values(out / METRICS)
            while state.step < steps:
                factor = learning_rate_factor(config, state.step)
                scale_learning_rates(optimizers, factor)
                wait_start = time.perf_counter()
                batch = prefetcher.batch(state.step)
                waited = time.perf_counter() - wait_start
                step_diagnostics = diagnostics.of_step(state.step + 1, step, batch)
                start = time.perf_counter()
                accept = step_diagnostics.wrap_accept(outliers.accepts if config.skip_loss_spikes else _accept_all)
                with profiler.step(state.step + 1):
                    result = step.run(batch, accept)
                _check(result, step, state.step, checkpoints, progress)
                state.step += 1
                seconds = waited + time.perf_counter() - start
                state.seconds += seconds
                if throughput_check is not None:
                    throughput_check.add_step(seconds)
                extra = on_step_end(state.step, step) | step_diagnostics.metrics()
                values = {
                    "loss": result.loss,
                    "learning_rate": config.learning_rate * factor,
                    "gradient_norm": result.gradient_norm,
                    "tokens": state.step * throughput.tokens_per_step,
                    **throughput.add_step(seconds, waited),
                    "seconds": round(state.seconds, 3),
                    **({} if result.updated else {"skipped": 1}),
                    **routing_metrics(step.visits_LE),
                    **extra,
                }
                latest |= values
                if extra or not result.updated or state.step % config.log_every == 0 or state.step == steps:
                    metrics.write(state.step, **values)
                task.reach(state.step, throughput.progress_line(latest))
                due = time.monotonic() - saved_at >= 60 * config.checkpoint_minutes
                due, stop = mesh.any(due and mesh.leads, interrupts.received is not None)
                kept = config.checkpoint_every is not None and state.step % config.checkpoint_every == 0
                if due or stop or kept or state.step == steps:
                    checkpoints.save(state)
                    saved_at = time.monotonic()
                if stop:
                    checkpoints.wait()
                    progress.say(f"  stopped after step {state.step:,} of {steps:,}; run again to resume")
                    interrupts.deliver()
            checkpoints.wait()
    rate = steps * throughput.tokens_per_step / state.seconds
    return {
        "steps": steps,
        **{name: value for name, value in latest.items() if name not in _STEP_METRICS and "/" not in name},
        "tokens_per_second": round(rate),
        **throughput.utilisation(rate),
        "dtype": runtime.dtype,
        "compile": runtime.compile,
        "threads": runtime.threads,
        **({} if mesh.alone else {"processes": mesh.layout.world_size}),
    }


def _trackers(config: LoopConfig, out: Path, step: int, progress: Progress) -> list[Tracker]:
    """The trackers that the settings name; none where no step is left to log."""
    names = config.track if config.steps is not None and step < config.steps else []
    return open_trackers(names, out, config, project=config.track_project, resume_at=step, progress=progress)


def _accept_all(loss: float, norm: float) -> bool:
    return True


def _check(result: StepResult, step: TrainStep, number: int, checkpoints: CheckpointManager, progress: Progress) -> None:
    """Report a skipped step. Raises DivergenceError when the gradient is not finite at any loss scale."""
    if result.updated:
        return
    if result.gradient_norm < float("inf"):
        progress.say(
            f"  step {number + 1:,} skipped: loss {result.loss:.3f}, gradient norm {result.gradient_norm:.3g}, far above "
            "the steps before it"
        )
    elif step.scale.exhausted:
        checkpoints.wait()
        kept = checkpoints.newest()
        raise DivergenceError(
            f"step {number + 1:,}: the gradient's norm is {result.gradient_norm}; "
            + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet")
            + ". Lower learning_rate, or try another seed or dtype"
        )


def _latest_values(path: Path) -> dict[str, Any]:
    """The newest value of every key of a metrics file; validation is not in every line."""
    latest: dict[str, Any] = {}
    for record in read_metrics(path):
        latest |= record
    return latest
