"""The one training loop: pretraining and every kind of fine-tuning differ in their batches and their loss.

The state after step n depends on the settings, the data and the seed alone: a run that was killed at any moment and
started again ends with the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bessemer.core.errors import BessemerError
from bessemer.core.hashing import hash_value
from bessemer.core.metrics import MetricsLog, read_metrics
from bessemer.core.progress import Progress, Silent
from bessemer.core.seeds import derive_seed
from bessemer.model.decoder import Decoder
from bessemer.training.batches import Batches
from bessemer.training.checkpoint import Checkpoints, TrainingState
from bessemer.training.config import LoopConfig
from bessemer.training.interrupts import DeferredInterrupts
from bessemer.training.loss import Loss, next_token_loss
from bessemer.training.optimizers import build_optimizers, scale_learning_rates
from bessemer.training.routing import routing_figures
from bessemer.training.schedule import warmup_stable_decay
from bessemer.training.session import Session
from bessemer.training.step import TrainingStep

METRICS = "metrics.jsonl"
#: Share of the newest step in the running speed that the progress line shows.
_SPEED_SMOOTHING = 0.1
#: Keys of a line of metrics that say nothing about the whole run.
_MOMENTARY = {"step", "learning_rate", "gradient_norm", "gflops"}


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
    loss: Loss = next_token_loss,
    observe: Callable[[int], dict[str, float]] = lambda finished: {},
    progress: Progress | None = None,
    description: str = "train",
) -> dict[str, Any]:
    """Train `model` in place for `config.steps` steps, going on from the newest checkpoint in `out`.

    Writes `metrics.jsonl` and `checkpoints/` below `out`. `observe` is called with the number of finished steps after
    each, and what it returns (validation) goes into that step's line. Returns the headline metrics.

    Ctrl-C and SIGTERM save a checkpoint at the end of the step, then act. Raises DivergenceError when the gradient is
    no longer finite, CheckpointError when the checkpoints are of another run, StorageError when the disk is full.
    """
    assert config.settled and config.steps is not None
    progress = progress or Silent()
    steps, tokens_per_step = config.steps, config.batch_size * config.context_length
    flops_per_step = model.config.flops_per_token(config.context_length) * tokens_per_step
    identity = {
        "configuration": hash_value([config.output_settings(), model.config.output_settings(), seed]),
        "data": batches.fingerprint,
    }
    with session.running(), DeferredInterrupts() as interrupts:
        torch.manual_seed(derive_seed(seed, "training"))
        session.prepare(model)
        optimizers = build_optimizers(model, config)
        step = TrainingStep(model, optimizers, loss, session, gradient_clip=config.gradient_clip)
        state = TrainingState(model, optimizers)
        checkpoints = Checkpoints(out / "checkpoints", identity, progress)
        if checkpoints.restore(state):
            progress.say(f"  going on from step {state.step:,} of {steps:,}")
        speed = 0.0
        saved_at = time.monotonic()
        with (
            MetricsLog(out / METRICS, resume_at=state.step if state.step else None) as metrics,
            progress.task(description, total=steps, unit="steps", completed=state.step) as task,
        ):
            latest = _latest_values(out / METRICS)
            while state.step < steps:
                start = time.perf_counter()
                factor = warmup_stable_decay(
                    state.step, steps, warmup_fraction=config.warmup_fraction, decay_fraction=config.decay_fraction
                )
                scale_learning_rates(optimizers, factor)
                outcome = step.run(step.read(batches, state.step))
                if not math.isfinite(outcome.gradient_norm):
                    raise DivergenceError(_divergence(state.step, outcome.gradient_norm, checkpoints.newest()))
                state.step += 1
                seconds = time.perf_counter() - start
                state.seconds += seconds
                rate = tokens_per_step / seconds
                speed = speed + _SPEED_SMOOTHING * (rate - speed) if speed else rate
                observed = observe(state.step)
                values = {
                    "loss": outcome.loss,
                    "learning_rate": config.learning_rate * factor,
                    "gradient_norm": outcome.gradient_norm,
                    "tokens": state.step * tokens_per_step,
                    "tokens_per_second": round(rate),
                    "gflops": round(flops_per_step / seconds / 1e9, 1),
                    "seconds": round(state.seconds, 3),
                    **routing_figures(model),
                    **observed,
                }
                latest |= values
                if observed or state.step % config.log_every == 0 or state.step == steps:
                    metrics.write(state.step, **values)
                task.reach(state.step, _note(latest, speed, flops_per_step / tokens_per_step))
                due = time.monotonic() - saved_at >= 60 * config.checkpoint_minutes
                if due or state.step == steps or interrupts.received is not None:
                    checkpoints.save(state)
                    saved_at = time.monotonic()
                if interrupts.received is not None:
                    progress.say(f"  stopped after step {state.step:,} of {steps:,}; run again to go on from there")
                    interrupts.deliver()
    return {
        "steps": steps,
        **{name: value for name, value in latest.items() if name not in _MOMENTARY},
        "tokens_per_second": round(steps * tokens_per_step / state.seconds),
        "dtype": session.dtype,
        "compile": session.compile,
        "threads": session.threads,
    }


def _latest_values(path: Path) -> dict[str, Any]:
    """The newest value of every key of a metrics file; validation is not in every line."""
    latest: dict[str, Any] = {}
    for record in read_metrics(path):
        latest |= record
    return latest


def _note(latest: dict[str, Any], tokens_per_second: float, flops_per_token: float) -> str:
    """What stands behind the bar: loss, bits per byte at the last validation, speed."""
    parts = [f"loss {latest['loss']:.3f}"]
    if "bits_per_byte" in latest:
        parts.append(f"{latest['bits_per_byte']:.3f} bits/byte")
    parts += [f"{tokens_per_second:,.0f} tokens/s", f"{tokens_per_second * flops_per_token / 1e9:,.0f} GFLOP/s"]
    return " · ".join(parts)


def _divergence(step: int, norm: float, checkpoint: Path | None) -> str:
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    return f"step {step + 1:,}: the gradient's norm is {norm}; {kept}. Lower learning_rate, or try another seed or dtype"
