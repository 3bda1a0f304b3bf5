"""The training loop of an open model: steps, validation, metrics, checkpoints.

The state after step n depends only on the settings, the data and the seed: a run that is killed at any moment and resumed ends
with the same weights, bit for bit, as an uninterrupted one; on another number of processes, up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bessemer.core.concurrency import DeferredInterrupts
from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.metrics import METRICS, MetricsLog, Tracker, read_metrics
from bessemer.core.progress import Progress, Silent, Task
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.adapters.trained import without_adapters
from bessemer.model.decoder import Decoder
from bessemer.training.checkpoint.manager import CHECKPOINTS, CheckpointManager
from bessemer.training.checkpoint.state import AVERAGE, ModelState, SourceState, Stateful, TrainingState
from bessemer.training.config import LoopConfig
from bessemer.training.data.batches import BatchSource, Prefetcher, ReadWhenNeeded, WarmedUpBatches
from bessemer.training.model_roles import POLICY, ModelRoles, OtherModel
from bessemer.training.model_setup import Load, PreparedModel, prepare_model
from bessemer.training.monitoring.diagnostics import Diagnostics
from bessemer.training.monitoring.guards import BestValidation, OutlierDetector
from bessemer.training.monitoring.profiler import StepProfiler
from bessemer.training.monitoring.run_metrics import Throughput, ThroughputCheck
from bessemer.training.monitoring.trackers import open_trackers
from bessemer.training.objectives import LossFunction, Objective, as_objective, build_objective
from bessemer.training.optim.mup import width_ratio
from bessemer.training.optim.optimizers import build_optimizers, freeze_parameters, scale_learning_rates
from bessemer.training.optim.weight_averaging import MovingAverage
from bessemer.training.runtime import Runtime, ThreadChoices
from bessemer.training.trainer import StepResult, Trainer

#: Keys of a line of metrics that describe one step and not the whole run, as keys with a slash do.
_STEP_METRICS = {"step", "learning_rate", "gradient_norm", "gflops", "peak_memory_bytes"}

#: Metrics after a number of finished steps; empty at most steps.
OnStepEnd = Callable[[int, Trainer], dict[str, float]]


def no_metrics(finished: int, trainer: Trainer) -> dict[str, float]:
    """An `OnStepEnd` of a run without validation."""
    return {}


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
    objective: Objective | LossFunction | None = None,
    others: Sequence[OtherModel] = (),
    on_step_end: OnStepEnd = no_metrics,
    progress: Progress | None = None,
    description: str = "train",
    mesh: Mesh = ALONE,
    load: Load | None = None,
    checkpoint_source: Path | None = None,
    folder: Path = Path(),
    peak_flops: float | None = None,
    throughput_check: ThroughputCheck | None = None,
) -> dict[str, Any]:
    """Train `model` in place for `config.steps` steps, resuming from the newest checkpoint in `out`.

    Writes `metrics.jsonl` and `checkpoints/` below `out`. Under a mesh every process calls this, on a shared disk, and the last
    checkpoint holds the whole weights. Returns the headline metrics.

    objective: instead of next-token prediction. others: models that the objective needs beside this one, or that are trained
    with it. load: gives the model its weights once it is prepared, where it has none before. on_step_end: its metrics
    (validation) go into that step's line. checkpoint_source: a checkpoint of another run, whose weights, optimizer states and
    step this run starts from. folder: where a user's own functions lie. peak_flops: of one process's device, FLOP/s.
    throughput_check: receives the seconds of each step with a full batch; an error that it raises ends the run.

    Ctrl-C and SIGTERM save a checkpoint at the end of the step before they take effect. Raises DivergenceError when the
    gradient is no longer finite, CheckpointError when the checkpoints are of another run, StorageError when the disk is full,
    ConfigError when a growing batch does not divide.
    """
    assert config.resolved and config.steps is not None
    progress = progress if progress is not None and mesh.leads else Silent()
    if config.batch_size_warmup is not None:
        if (conflict := config.rows_conflict(mesh.layout.data_ranks, config.micro_batch_size)) is not None:
            raise ConfigError(conflict)
        batches = WarmedUpBatches(batches, config.batch_sizes)
    freeze_parameters(model, config)
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
        models = _prepared(model, load, others, config, runtime, mesh)
        optimizers = _optimizers(models, others, config, folder)
        trainer = Trainer(
            models.policy.model,
            [optimizer for each in optimizers.values() for optimizer in each],
            as_objective(objective) if objective is not None else build_objective(config, model.config),
            runtime,
            gradient_clip=config.gradient_clip,
            mesh=mesh,
            average=None if config.ema is None else MovingAverage(models.policy.model, config.ema),
            models=models,
        )
        guards = Guards(OutlierDetector(), BestValidation(config.early_stopping_patience))
        batches.bind(models)
        background = config.checkpoint_background
        state = TrainingState(models.policy.model, optimizers[POLICY], _stateful(config, trainer, optimizers, guards, batches))
        checkpoints = CheckpointManager(
            out / CHECKPOINTS,
            identity,
            progress,
            mesh=mesh,
            keep_every=config.checkpoint_every,
            background=torch.device(runtime.device).type == "cuda" if background == "auto" else background,
        )
        loop = TrainingLoop(
            config=config,
            trainer=trainer,
            source=batches,
            state=state,
            checkpoints=checkpoints,
            guards=guards,
            diagnostics=diagnostics,
            throughput=throughput,
            interrupts=interrupts,
            out=out,
            on_step_end=on_step_end,
            progress=progress,
            throughput_check=throughput_check,
        )
        loop.restore(checkpoint_source)
        return loop.run(description)


def _prepared(
    model: Decoder, load: Load | None, others: Sequence[OtherModel], config: LoopConfig, runtime: Runtime, mesh: Mesh
) -> ModelRoles:
    """All models of a run, prepared and with their weights: the policy, those that are trained with it, frozen ones."""
    policy = prepare_model(model, config, runtime, mesh)
    if load is not None:
        load(policy)
    by_role: dict[str, PreparedModel] = {}
    for other in sorted(others, key=lambda other: not other.trained):
        by_role[other.role] = prepare_model(other.decoder, config, runtime, mesh)
    for other in others:
        if other.load is not None:
            other.load(by_role[other.role])
    return ModelRoles(
        {POLICY: policy, **{other.role: by_role[other.role] for other in others if other.trained}},
        runtime,
        mesh=mesh,
        frozen={other.role: by_role[other.role] for other in others if not other.trained},
        micro_batch_size=config.micro_batch_size,
        without_adapters=None if config.low_rank is None else without_adapters,
    )


def _optimizers(
    models: ModelRoles, others: Sequence[OtherModel], config: LoopConfig, folder: Path
) -> dict[str, list[torch.optim.Optimizer]]:
    """The optimizers of every trained model, by its role."""
    settings = {other.role: other.settings or config for other in others}
    return {
        role: build_optimizers(
            prepared.model, settings.get(role, config), folder, width=width_ratio(config, prepared.model.config)
        )
        for role, prepared in models.trained.items()
    }


@dataclass(frozen=True)
class Guards:
    """Detectors that skip a step, at a loss spike, or end a run whose validations no longer improve."""

    outliers: OutlierDetector
    best: BestValidation


def _stateful(
    config: LoopConfig,
    trainer: Trainer,
    optimizers: dict[str, list[torch.optim.Optimizer]],
    guards: Guards,
    source: BatchSource,
) -> dict[str, Stateful]:
    """State besides the policy's weights and optimizers, by its name in a checkpoint."""
    others: dict[str, Stateful] = {"outliers": guards.outliers, "loss_scale": trainer.scale}
    if trainer.average is not None:
        others[AVERAGE] = trainer.average
    for role, prepared in trainer.models.trained.items():
        if role != POLICY:
            others[role] = ModelState(prepared.model, optimizers[role])
    if config.early_stopping_patience is not None or config.save == "best":
        others["best"] = guards.best
    if not source.lookahead:
        others["source"] = SourceState(source, trainer.mesh)
    return others


class FinishedStep(NamedTuple):
    """A step's metrics. extra: those of validation and diagnostics, which are logged whatever `log_every` says."""

    metrics: dict[str, Any]
    extra: dict[str, float]
    updated: bool


@dataclass
class TrainingLoop:
    """Runs the remaining steps: each is computed, logged, and followed by a checkpoint where one is due."""

    config: LoopConfig
    trainer: Trainer
    source: BatchSource
    state: TrainingState
    checkpoints: CheckpointManager
    guards: Guards
    diagnostics: Diagnostics
    throughput: Throughput
    interrupts: DeferredInterrupts
    out: Path
    on_step_end: OnStepEnd
    progress: Progress
    throughput_check: ThroughputCheck | None = None

    def __post_init__(self) -> None:
        assert self.config.steps is not None
        self._steps = self.config.steps
        self._runtime, self._mesh = self.trainer.runtime, self.trainer.mesh
        self._learning_rates = self.config.learning_rates
        self._validated = self.config.validated_steps
        self._threads: ThreadChoices | None = None
        self._saved_at = time.monotonic()
        #: The newest value of every metric.
        self._latest: dict[str, Any] = {}

    def restore(self, checkpoint_source: Path | None) -> None:
        """Resume from the run's newest checkpoint, or start from another run's."""
        state, progress = self.state, self.progress
        if self.checkpoints.restore(state):
            progress.say(f"  resuming from step {state.step:,} of {self._steps:,}")
        elif checkpoint_source is not None:
            missing = self.checkpoints.load_from(checkpoint_source, state)
            if self.trainer.average is not None and AVERAGE in missing:
                self.trainer.average.restart()
            progress.say(f"  resuming from step {state.step:,} of {checkpoint_source}, to {self._steps:,}")
            if state.step >= self._steps:
                raise ConfigError(f"init_from: {checkpoint_source} is at step {state.step:,}; steps must be larger")

    def run(self, description: str) -> dict[str, Any]:
        """Take the steps that are left; returns the headline metrics."""
        config, state, best, steps = self.config, self.state, self.guards.best, self._steps
        self._saved_at = time.monotonic()
        with (
            MetricsLog(self.out / METRICS, state.step or None, writes=self._mesh.leads, trackers=self._trackers()) as metrics,
            self.progress.task(description, total=steps, unit="steps", completed=state.step) as task,
            self._reader() as reader,
            StepProfiler(config.profile, self.out, self._mesh) as profiler,
        ):
            self._latest = _latest_values(self.out / METRICS)
            if self._runtime.adapts_threads:
                self._threads = ThreadChoices(self.out, self._runtime.threads)
                self._threads.resume(state.step)
            self.trainer.models.version = state.step
            self.checkpoints.kept_step = best.step if config.save == "best" else None
            while state.step < steps and not best.exhausted:
                finished = self._step(reader, profiler)
                self._record(finished, metrics, task)
                self._save_if_due(finished)
            self.checkpoints.wait()
            if best.exhausted:
                self.progress.say(
                    f"  stopped after step {state.step:,} of {steps:,}: {config.early_stopping_patience} validations in a row "
                    f"were not better than {best.loss:.4f} at step {best.step:,}"
                )
        return self._summary()

    def _trackers(self) -> list[Tracker]:
        """The trackers that the settings name; none where no step is left to log."""
        config, step = self.config, self.state.step
        if not self._mesh.leads:
            return []
        names = config.track if step < self._steps else []
        return open_trackers(names, self.out, config, project=config.track_project, resume_at=step, progress=self.progress)

    def _reader(self) -> Prefetcher | ReadWhenNeeded:
        read, lookahead = partial(self.trainer.read, self.source), self.source.lookahead
        if not lookahead:
            return ReadWhenNeeded(read)
        on_gpu = torch.device(self._runtime.device).type == "cuda"
        return Prefetcher(read, range(self.state.step, self._steps), depth=lookahead, pin=on_gpu)

    def _step(self, reader: Prefetcher | ReadWhenNeeded, profiler: StepProfiler) -> FinishedStep:
        """Compute the next step, and validate and measure after it."""
        config, state, trainer = self.config, self.state, self.trainer
        factor = self._learning_rates.factor(state.step)
        scale_learning_rates(trainer.optimizers, factor)
        wait_start = time.perf_counter()
        batch = reader.batch(state.step)
        waited = time.perf_counter() - wait_start
        diagnostics = self.diagnostics.of_step(state.step + 1, trainer, batch)
        start = time.perf_counter()
        accept = diagnostics.wrap_accept(self._accept())
        with profiler.step(state.step + 1):
            result = trainer.step(batch, accept)
        self._check(result)
        state.step += 1
        seconds = waited + time.perf_counter() - start
        state.seconds += seconds
        rows = self.source.batch_size_at(state.step - 1)
        if self.throughput_check is not None and rows == config.batch_size:
            self.throughput_check.add_step(seconds)
        extra = self.on_step_end(state.step, trainer) | diagnostics.metrics()
        if self._threads is not None and state.step < self._steps:
            chosen = self._threads.after_step(state.step, seconds, validated=state.step in self._validated)
            extra |= {} if chosen is None else {"threads": chosen}
        metrics = {
            "loss": result.loss,
            "learning_rate": config.learning_rate * factor,
            "gradient_norm": result.gradient_norm,
            "tokens": config.tokens_before(state.step),
            **self.throughput.add_step(rows * config.context_length, seconds, waited),
            "seconds": round(state.seconds, 3),
            **({} if result.updated else {"skipped": 1}),
            **result.metrics,
            **extra,
        }
        return FinishedStep(metrics, extra, result.updated)

    def _accept(self) -> Callable[[float, float], bool]:
        """Whether the next step may be taken, of its loss and gradient norm; of the norm alone where the loss is no sign of
        trouble."""
        if not self.config.skip_loss_spikes:
            return lambda loss, norm: True
        outliers, judges_loss = self.guards.outliers, self.trainer.objective.guards_loss
        guarded = self.config.guards_loss_spikes(self.state.step)
        return lambda loss, norm: outliers.accepts(loss if judges_loss else 0.0, norm, guarded=guarded)

    def _check(self, result: StepResult) -> None:
        """Report a skipped step. Raises DivergenceError when the gradient is not finite at any loss scale."""
        if result.updated:
            return
        number = self.state.step + 1
        if result.gradient_norm < float("inf"):
            self.progress.say(
                f"  step {number:,} skipped: loss {result.loss:.3f}, gradient norm {result.gradient_norm:.3g}, far above "
                "the steps before it"
            )
        elif self.trainer.scale.exhausted:
            self.checkpoints.wait()
            kept = self.checkpoints.newest()
            raise DivergenceError(
                f"step {number:,}: the gradient's norm is {result.gradient_norm}; "
                + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet")
                + ". Lower learning_rate, or try another seed or dtype"
            )

    def _record(self, finished: FinishedStep, log: MetricsLog, task: Task) -> None:
        """Log a step where it is due, and show it."""
        step = self.state.step
        self._latest |= finished.metrics
        if finished.extra or not finished.updated or step % self.config.log_every == 0 or step == self._steps:
            log.write(step, **finished.metrics)
        task.reach(step, self.throughput.progress_line(self._latest))

    def _save_if_due(self, finished: FinishedStep) -> None:
        """Save a checkpoint by time, by step, after the best validation, at the end, and before an interrupt takes effect."""
        config, state, best = self.config, self.state, self.guards.best
        minutes = config.minutes_between_checkpoints(state.seconds / state.step * self._steps)
        due = time.monotonic() - self._saved_at >= 60 * minutes
        due, stop = self._mesh.any(due and self._mesh.leads, self.interrupts.received is not None)
        kept = config.checkpoint_every is not None and state.step % config.checkpoint_every == 0
        extra = finished.extra
        better = "validation_loss" in extra and best.add_validation(state.step, extra["validation_loss"])
        if better and config.save == "best":
            self.checkpoints.kept_step, kept = best.step, True
        if due or stop or kept or state.step == self._steps or best.exhausted:
            self.checkpoints.save(state)
            self._saved_at = time.monotonic()
        if stop:
            self.checkpoints.wait()
            self.progress.say(f"  stopped after step {state.step:,} of {self._steps:,}; run again to resume")
            self.interrupts.deliver()

    def _summary(self) -> dict[str, Any]:
        """The headline metrics: the newest of every metric of the whole run, and how it was computed."""
        config, state, best, runtime, latest = self.config, self.state, self.guards.best, self._runtime, self._latest
        rate = config.tokens_before(state.step) / state.seconds
        return {
            "steps": state.step,
            **{name: value for name, value in latest.items() if name not in _STEP_METRICS and "/" not in name},
            "tokens_per_second": round(rate),
            **({} if config.save != "best" or best.step is None else {"best_step": best.step}),
            **self.throughput.utilisation(rate),
            "dtype": runtime.dtype,
            "compile": runtime.compile,
            "threads": latest.get("threads", runtime.threads),
            **({} if self._mesh.alone else {"processes": self._mesh.layout.world_size}),
        }


def _latest_values(path: Path) -> dict[str, Any]:
    """The newest value of every key of a metrics file; validation is not in every line."""
    latest: dict[str, Any] = {}
    for record in read_metrics(path):
        latest |= record
    return latest


def validation_metrics(trainer: Trainer, source: BatchSource, steps: int) -> dict[str, float]:
    """`validation_loss`, the objective's loss over the first `steps` batches of a source, and its figures as
    `validation_NAME`."""
    totals = trainer.evaluate(trainer.read(source, step) for step in range(steps))
    figures = {f"validation_{name}": value for name, value in totals.metrics.items()}
    return {"validation_loss": totals.loss, **figures}
