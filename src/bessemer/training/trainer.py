"""The one training loop: pretraining and every kind of fine-tuning differ in their batches and their loss.

The state after step n depends on the settings, the data and the seed alone: a run that was killed at any moment and
started again ends with the same weights, bit for bit, as one that was not; on another number of processes, up to rounding.
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
from bessemer.training.checkpoint.manager import CHECKPOINTS, Checkpoints
from bessemer.training.checkpoint.state import AVERAGE, Remembers, TrainingState
from bessemer.training.config import LoopConfig
from bessemer.training.data.batches import Batches
from bessemer.training.data.prefetch import Prefetcher
from bessemer.training.model_setup import prepare
from bessemer.training.moe_losses import routing_figures
from bessemer.training.monitoring.diagnostics import Observation
from bessemer.training.monitoring.profiler import Profile
from bessemer.training.monitoring.throughput import Pace
from bessemer.training.monitoring.throughput_check import PaceCheck
from bessemer.training.monitoring.trackers import open_trackers
from bessemer.training.objectives import Loss, loss_of
from bessemer.training.optim.build import build_optimizers, scale_learning_rates
from bessemer.training.optim.lr_schedule import learning_rate_factor
from bessemer.training.optim.mup import width_ratio
from bessemer.training.optim.weight_averaging import MovingAverage
from bessemer.training.outlier_steps import OutlierDetector
from bessemer.training.runtime import Session
from bessemer.training.train_step import Outcome, TrainingStep

METRICS = "metrics.jsonl"
#: Keys of a line of metrics that say nothing about the whole run, nor does one with a slash.
_MOMENTARY = {"step", "learning_rate", "gradient_norm", "gflops", "peak_memory_bytes"}


class DivergenceError(BessemerError):
    """The loss or the gradient stopped being a number."""


def train(
    model: Decoder,
    batches: Batches,
    config: LoopConfig,
    out: Path,
    *,
    session: Session,
    seed: int,
    loss: Loss | None = None,
    observe: Callable[[int, TrainingStep], dict[str, float]] = lambda finished, step: {},
    progress: Progress | None = None,
    description: str = "train",
    mesh: Mesh = ALONE,
    origin: Path | None = None,
    folder: Path = Path(),
    peak_flops: float | None = None,
    pace_check: PaceCheck | None = None,
) -> dict[str, Any]:
    """Train `model` in place for `config.steps` steps, going on from the newest checkpoint in `out`.

    Writes `metrics.jsonl` and `checkpoints/` below `out`. `observe` is called with the number of finished steps after
    each and with what makes them; what it returns (validation) goes into that step's line. Under a mesh every process calls
    this, on a disk that they share, and the whole weights lie in the last checkpoint. loss: a user's own in place of the next
    token's. A user's own functions lie below `folder`. Returns the headline metrics.

    origin: a checkpoint of another run, from whose weights, optimizers and step this one starts. peak_flops: of one process's
    device, FLOP/s (`device_peak`). pace_check: told how long each step took; what it raises ends the run.

    Ctrl-C and SIGTERM save a checkpoint at the end of the step, then act. Raises DivergenceError when the gradient is
    no longer finite, CheckpointError when the checkpoints are of another run, StorageError when the disk is full.
    """
    assert config.settled and config.steps is not None
    progress = progress if progress is not None and mesh.leads else Silent()
    steps, observation = config.steps, Observation(model, config, mesh)
    pace = Pace(config, model.config, None if peak_flops is None else peak_flops * mesh.layout.world_size)
    identity = {
        "model": hash_value(model.config.output_settings()),
        "optimizer": config.optimizer,
        "configuration": hash_value([config.output_settings(), model.config.output_settings(), seed]),
        "data": batches.fingerprint,
    }
    with session.running(), DeferredInterrupts() as interrupts:
        torch.manual_seed(derive_seed(seed, "training"))
        model, pipeline = prepare(model, config, session, mesh)
        optimizers = build_optimizers(model, config, folder, width=width_ratio(config, model.config))
        average = None if config.ema is None else MovingAverage(model, config.ema)
        step = TrainingStep(
            model,
            optimizers,
            loss or loss_of(config),
            session,
            gradient_clip=config.gradient_clip,
            micro_batch_size=config.micro_batch_size,
            mesh=mesh,
            pipeline=pipeline,
            average=average,
        )
        outliers = OutlierDetector()
        others: dict[str, Remembers] = {"outliers": outliers, "loss_scale": step.scale}
        state = TrainingState(model, optimizers, others if average is None else others | {AVERAGE: average})
        on_gpu = torch.device(session.device).type == "cuda"
        background = on_gpu
        if config.checkpoint_background != "auto":
            background = config.checkpoint_background
        checkpoints = Checkpoints(
            out / CHECKPOINTS, identity, progress, mesh=mesh, keep_every=config.checkpoint_every, background=background
        )
        if checkpoints.restore(state):
            progress.say(f"  going on from step {state.step:,} of {steps:,}")
        elif origin is not None:
            begun = checkpoints.adopt(origin, state)
            if average is not None and AVERAGE in begun:
                average.restart()
            progress.say(f"  going on from step {state.step:,} of {origin}, to {steps:,}")
            if state.step >= steps:
                raise ConfigError(f"init_from: {origin} has gone {state.step:,} steps; steps must be more than that")
        saved_at = time.monotonic()
        trackers = _trackers(config, out, state.step, progress) if mesh.leads else []
        with (
            MetricsLog(out / METRICS, state.step or None, writes=mesh.leads, trackers=trackers) as metrics,
            progress.task(description, total=steps, unit="steps", completed=state.step) as task,
            Prefetcher(partial(step.read, batches), range(state.step, steps), pin=on_gpu) as ahead,
            Profile(config.profile, out, mesh) as profile,
        ):
            latest = _latest_values(out / METRICS)
            while state.step < steps:
                factor = learning_rate_factor(config, state.step)
                scale_learning_rates(optimizers, factor)
                asked = time.perf_counter()
                batch = ahead.batch(state.step)
                waited = time.perf_counter() - asked
                watch = observation.watch(state.step + 1, step, batch)
                start = time.perf_counter()
                accept = watch.accepting(outliers.accepts if config.skip_outliers else _accept_all)
                with profile.step(state.step + 1):
                    outcome = step.run(batch, accept)
                _check(outcome, step, state.step, checkpoints, progress)
                state.step += 1
                seconds = waited + time.perf_counter() - start
                state.seconds += seconds
                if pace_check is not None:
                    pace_check.note(seconds)
                observed = observe(state.step, step) | watch.figures()
                values = {
                    "loss": outcome.loss,
                    "learning_rate": config.learning_rate * factor,
                    "gradient_norm": outcome.gradient_norm,
                    "tokens": state.step * pace.tokens_per_step,
                    **pace.step(seconds, waited),
                    "seconds": round(state.seconds, 3),
                    **({} if outcome.moved else {"skipped": 1}),
                    **routing_figures(step.visits_LE),
                    **observed,
                }
                latest |= values
                if observed or not outcome.moved or state.step % config.log_every == 0 or state.step == steps:
                    metrics.write(state.step, **values)
                task.reach(state.step, pace.note(latest))
                due = time.monotonic() - saved_at >= 60 * config.checkpoint_minutes
                due, stop = mesh.any(due and mesh.leads, interrupts.received is not None)
                kept = config.checkpoint_every is not None and state.step % config.checkpoint_every == 0
                if due or stop or kept or state.step == steps:
                    checkpoints.save(state)
                    saved_at = time.monotonic()
                if stop:
                    checkpoints.wait()
                    progress.say(f"  stopped after step {state.step:,} of {steps:,}; run again to go on from there")
                    interrupts.deliver()
            checkpoints.wait()
    rate = steps * pace.tokens_per_step / state.seconds
    return {
        "steps": steps,
        **{name: value for name, value in latest.items() if name not in _MOMENTARY and "/" not in name},
        "tokens_per_second": round(rate),
        **pace.utilisation(rate),
        "dtype": session.dtype,
        "compile": session.compile,
        "threads": session.threads,
        **({} if mesh.alone else {"processes": mesh.layout.world_size}),
    }


def _trackers(config: LoopConfig, out: Path, step: int, progress: Progress) -> list[Tracker]:
    """Those that the settings name, where there is a step left to tell them of."""
    names = config.track if config.steps is not None and step < config.steps else []
    return open_trackers(names, out, config, project=config.track_project, resume_at=step, progress=progress)


def _accept_all(loss: float, norm: float) -> bool:
    return True


def _check(outcome: Outcome, step: TrainingStep, number: int, checkpoints: Checkpoints, progress: Progress) -> None:
    """Say that a step was left out, or end a run whose gradient is no number."""
    if outcome.moved:
        return
    if outcome.gradient_norm < float("inf"):
        progress.say(
            f"  step {number + 1:,} left out: loss {outcome.loss:.3f}, gradient norm {outcome.gradient_norm:.3g}, far above "
            "the steps before it"
        )
    elif step.scale.exhausted:
        checkpoints.wait()
        kept = checkpoints.newest()
        raise DivergenceError(
            f"step {number + 1:,}: the gradient's norm is {outcome.gradient_norm}; "
            + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet")
            + ". Lower learning_rate, or try another seed or dtype"
        )


def _latest_values(path: Path) -> dict[str, Any]:
    """The newest value of every key of a metrics file; validation is not in every line."""
    latest: dict[str, Any] = {}
    for record in read_metrics(path):
        latest |= record
    return latest
