"""A training job, from a model's folder to the trained one: the loop that all methods of training share.

Methods differ in their source of batches, their objective and what they validate. The state after step n depends only on the
settings, the data and the seed: a run that is killed at any moment and resumed ends with the same weights, bit for bit, as an
uninterrupted one; on another number of processes, up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from bessemer.core.concurrency import DeferredInterrupts
from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.metrics import METRICS, MetricsLog, Tracker, read_metrics
from bessemer.core.progress import Progress, Silent
from bessemer.core.stage import OpenTasks
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.adapters.trained import adapters_of, without_adapters
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import read_model_config
from bessemer.training.autotune import Plan, prepare_run
from bessemer.training.checkpoint.export import save_trained, save_trained_adapter
from bessemer.training.checkpoint.manager import CHECKPOINTS, CheckpointManager
from bessemer.training.checkpoint.state import AVERAGE, ModelState, SourceState, Stateful, TrainingState
from bessemer.training.config import LoopConfig
from bessemer.training.data.batches import Batch, BatchSource, Prefetcher, ReadWhenNeeded, WarmedUpBatches
from bessemer.training.model_roles import Trainee
from bessemer.training.model_setup import Load, PreparedModel, open_start, prepare_model
from bessemer.training.monitoring.diagnostics import Diagnostics
from bessemer.training.monitoring.guards import BestValidation, OutlierDetector
from bessemer.training.monitoring.profiler import StepProfiler, device_peak
from bessemer.training.monitoring.run_metrics import PeriodicTasks, Throughput, ThroughputCheck, check_processes, open_tasks
from bessemer.training.monitoring.trackers import open_trackers
from bessemer.training.objectives import POLICY, LossFunction, Objective, as_objective, build_objective
from bessemer.training.optim.lr_schedule import multiples, validated_steps
from bessemer.training.optim.mup import width_ratio
from bessemer.training.optim.optimizers import build_optimizers, freeze_parameters, scale_learning_rates
from bessemer.training.optim.weight_averaging import MovingAverage
from bessemer.training.runtime import Runtime, ThreadChoices
from bessemer.training.trainer import StepResult, Trainer

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
    objective: Objective | LossFunction | None = None,
    beside: Mapping[str, Decoder] | None = None,
    settings_beside: Mapping[str, LoopConfig] | None = None,
    frozen: Mapping[str, Decoder] | None = None,
    without_adapters: Callable[[Decoder], AbstractContextManager[None]] | None = None,
    on_step_end: Callable[[int, Trainer], dict[str, float]] = lambda finished, trainer: {},
    progress: Progress | None = None,
    description: str = "train",
    mesh: Mesh = ALONE,
    load: Load | None = None,
    load_others: Mapping[str, Load | None] | None = None,
    checkpoint_source: Path | None = None,
    folder: Path = Path(),
    peak_flops: float | None = None,
    throughput_check: ThroughputCheck | None = None,
) -> dict[str, Any]:
    """Train `model` in place for `config.steps` steps, resuming from the newest checkpoint in `out`.

    Writes `metrics.jsonl` and `checkpoints/` below `out`. Under a mesh every process calls this, on a shared disk, and the last
    checkpoint holds the whole weights. Returns the headline metrics.

    objective: instead of next-token prediction. beside: models by role that are trained with it, as a critic.
    settings_beside: by role, settings of their optimizers other than `config`. frozen: models by role that are not trained, as
    a reference or a teacher. without_adapters: as of `Trainee`. load: gives the model its weights once it is prepared, where it
    has none before; load_others: the same of those beside it and frozen, by role. on_step_end: called after each step with the
    number of finished steps and the `Trainer`; the metrics that it returns (validation) go into that step's line.
    checkpoint_source: a checkpoint of another run, whose weights, optimizer states and step this run starts from. folder: where
    a user's own functions lie. peak_flops: of one process's device, FLOP/s (`device_peak`). throughput_check: receives the
    seconds of each step with a full batch; an error that it raises ends the run.

    Ctrl-C and SIGTERM save a checkpoint at the end of the step before they take effect. Raises DivergenceError when the
    gradient is no longer finite, CheckpointError when the checkpoints are of another run, StorageError when the disk is full,
    ConfigError when a growing batch does not divide.
    """
    assert config.resolved and config.steps is not None
    progress = progress if progress is not None and mesh.leads else Silent()
    steps = config.steps
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
        model, pipeline = prepare_model(model, config, runtime, mesh)
        trained = {POLICY: PreparedModel(model, pipeline)}
        if load is not None:
            load(trained[POLICY])
        trained |= {role: prepare_model(each, config, runtime, mesh) for role, each in (beside or {}).items()}
        fixed = {role: prepare_model(each, config, runtime, mesh) for role, each in (frozen or {}).items()}
        for role, load_other in (load_others or {}).items():
            if load_other is not None:
                load_other((trained | fixed)[role])
        optimizers_of = {
            role: build_optimizers(
                each.model, (settings_beside or {}).get(role, config), folder, width=width_ratio(config, each.model.config)
            )
            for role, each in trained.items()
        }
        optimizers = [optimizer for each in optimizers_of.values() for optimizer in each]
        average = None if config.ema is None else MovingAverage(model, config.ema)
        trainer = Trainer(
            model,
            optimizers,
            as_objective(objective) if objective is not None else build_objective(config, model.config),
            runtime,
            gradient_clip=config.gradient_clip,
            mesh=mesh,
            average=average,
            trainee=Trainee(
                trained,
                runtime,
                mesh=mesh,
                frozen=fixed,
                micro_batch_size=config.micro_batch_size,
                without_adapters=without_adapters,
            ),
        )
        outliers, best = OutlierDetector(), BestValidation(config.early_stopping_patience)
        others: dict[str, Stateful] = {"outliers": outliers, "loss_scale": trainer.scale}
        if average is not None:
            others[AVERAGE] = average
        for role in beside or {}:
            others[role] = ModelState(trained[role].model, optimizers_of[role])
        if config.early_stopping_patience is not None or config.save == "best":
            others["best"] = best
        batches.bind(trainer.trainee)
        if not batches.lookahead:
            others["source"] = SourceState(batches, mesh)
        state = TrainingState(model, optimizers_of[POLICY], others)
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
            _reader(partial(trainer.read, batches), range(state.step, steps), batches.lookahead, pin=on_gpu) as reader,
            StepProfiler(config.profile, out, mesh) as profiler,
        ):
            latest = _latest_values(out / METRICS)
            threads = ThreadChoices(out, runtime.threads) if runtime.adapts_threads else None
            if threads is not None:
                threads.resume(state.step)
            validated = validated_steps(config)
            trainer.trainee.version = state.step
            checkpoints.kept_step = best.step if config.save == "best" else None
            learning_rates = config.learning_rates
            while state.step < steps and not best.exhausted:
                factor = learning_rates.factor(state.step)
                scale_learning_rates(optimizers, factor)
                wait_start = time.perf_counter()
                batch = reader.batch(state.step)
                waited = time.perf_counter() - wait_start
                step_diagnostics = diagnostics.of_step(state.step + 1, trainer, batch)
                start = time.perf_counter()
                accept = step_diagnostics.wrap_accept(_guard(config, trainer.objective, outliers, state.step))
                with profiler.step(state.step + 1):
                    result = trainer.step(batch, accept)
                _check(result, trainer, state.step, checkpoints, progress)
                state.step += 1
                seconds = waited + time.perf_counter() - start
                state.seconds += seconds
                rows = batches.batch_size_at(state.step - 1)
                if throughput_check is not None and rows == config.batch_size:
                    throughput_check.add_step(seconds)
                extra = on_step_end(state.step, trainer) | step_diagnostics.metrics()
                if threads is not None and state.step < steps:
                    chosen = threads.after_step(state.step, seconds, validated=state.step in validated)
                    extra |= {} if chosen is None else {"threads": chosen}
                values = {
                    "loss": result.loss,
                    "learning_rate": config.learning_rate * factor,
                    "gradient_norm": result.gradient_norm,
                    "tokens": config.tokens_before(state.step),
                    **throughput.add_step(rows * config.context_length, seconds, waited),
                    "seconds": round(state.seconds, 3),
                    **({} if result.updated else {"skipped": 1}),
                    **result.metrics,
                    **extra,
                }
                latest |= values
                if extra or not result.updated or state.step % config.log_every == 0 or state.step == steps:
                    metrics.write(state.step, **values)
                task.reach(state.step, throughput.progress_line(latest))
                due = time.monotonic() - saved_at >= 60 * config.checkpoint_minutes
                due, stop = mesh.any(due and mesh.leads, interrupts.received is not None)
                kept = config.checkpoint_every is not None and state.step % config.checkpoint_every == 0
                better = "validation_loss" in extra and best.add_validation(state.step, extra["validation_loss"])
                if better and config.save == "best":
                    checkpoints.kept_step, kept = best.step, True
                if due or stop or kept or state.step == steps or best.exhausted:
                    checkpoints.save(state)
                    saved_at = time.monotonic()
                if stop:
                    checkpoints.wait()
                    progress.say(f"  stopped after step {state.step:,} of {steps:,}; run again to resume")
                    interrupts.deliver()
            checkpoints.wait()
            if best.exhausted:
                progress.say(
                    f"  stopped after step {state.step:,} of {steps:,}: {config.early_stopping_patience} validations in a row "
                    f"were not better than {best.loss:.4f} at step {best.step:,}"
                )
    rate = config.tokens_before(state.step) / state.seconds
    return {
        "steps": state.step,
        **{name: value for name, value in latest.items() if name not in _STEP_METRICS and "/" not in name},
        "tokens_per_second": round(rate),
        **({} if config.save != "best" or best.step is None else {"best_step": best.step}),
        **throughput.utilisation(rate),
        "dtype": runtime.dtype,
        "compile": runtime.compile,
        "threads": latest.get("threads", runtime.threads),
        **({} if mesh.alone else {"processes": mesh.layout.world_size}),
    }


def _trackers(config: LoopConfig, out: Path, step: int, progress: Progress) -> list[Tracker]:
    """The trackers that the settings name; none where no step is left to log."""
    names = config.track if config.steps is not None and step < config.steps else []
    return open_trackers(names, out, config, project=config.track_project, resume_at=step, progress=progress)


def _reader(read: Callable[[int], Batch], steps: range, lookahead: int, *, pin: bool) -> Prefetcher | ReadWhenNeeded:
    return Prefetcher(read, steps, depth=lookahead, pin=pin) if lookahead else ReadWhenNeeded(read)


def _guard(config: LoopConfig, objective: Objective, outliers: OutlierDetector, step: int) -> Callable[[float, float], bool]:
    """Whether a step may be taken, of its loss and gradient norm; of the norm alone where the loss is no sign of trouble."""
    if not config.skip_loss_spikes:
        return lambda loss, norm: True
    guarded = config.guards_loss_spikes(step)
    return lambda loss, norm: outliers.accepts(loss if objective.guards_loss else 0.0, norm, guarded=guarded)


def _check(result: StepResult, trainer: Trainer, number: int, checkpoints: CheckpointManager, progress: Progress) -> None:
    """Report a skipped step. Raises DivergenceError when the gradient is not finite at any loss scale."""
    if result.updated:
        return
    if result.gradient_norm < float("inf"):
        progress.say(
            f"  step {number + 1:,} skipped: loss {result.loss:.3f}, gradient norm {result.gradient_norm:.3g}, far above "
            "the steps before it"
        )
    elif trainer.scale.exhausted:
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


SomeConfig = TypeVar("SomeConfig", bound=LoopConfig)

#: Metrics after a number of finished steps; empty at most steps.
OnStepEnd = Callable[[int, Trainer], dict[str, float]]


def run_training(
    config: SomeConfig,
    model: Path,
    out: Path,
    batches: Callable[[SomeConfig, Mesh], BatchSource],
    *,
    seed: int,
    device: str,
    progress: Progress,
    description: str,
    folder: Path = Path(),
    card_flops: Callable[[str], float | None] = lambda name: None,
    prepare: Callable[[SomeConfig, Decoder, Mesh], OnStepEnd],
    initialise: Callable[[SomeConfig, Decoder, Mesh], object] = lambda config, decoder, mesh: None,
    tasks: OpenTasks | None = None,
    plan: Plan | None = None,
    only_resolve: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train the model of folder `model` and write `out/model`, with an adapter `out/adapter`, resuming from `out`; the headline
    metrics.

    batches: the source of a run with these settings, whose steps, dtype and compilation are decided by then. prepare: returns
    what validates the model, which has its weights only when training begins. initialise: changes the loaded weights, of the
    whole model or of this process's shards. tasks: opens those that the settings name. plan, only_resolve: as of
    `prepare_run`. options: those of `train`. Raises what `train` raises, and ConfigError or ArtefactError for tasks that cannot
    be asked.
    """
    scorer = open_tasks(config, folder, tasks)
    if scorer is not None:
        scorer.check(model, read_model_config(model).max_position_embeddings)
    config, runtime, mesh = prepare_run(
        config, model, out, device=device, progress=progress, folder=folder, plan=plan, only_resolve=only_resolve
    )
    source = batches(config, mesh)
    decoder, load = open_start(model, config, runtime.device, mesh, seed)
    if load is None:
        initialise(config, decoder, mesh)
    else:
        load = _then(load, lambda prepared: initialise(config, prepared.model, mesh))
    if config.low_rank is not None:
        options.setdefault("without_adapters", without_adapters)
    on_step_end = prepare(config, decoder, mesh)
    if scorer is not None:
        check_processes(mesh.layout.world_size)
        steps = _steps_with_tasks(config)
        on_step_end = _both(on_step_end, PeriodicTasks(scorer, decoder, model, steps))
        progress.say(f"  {', '.join(config.tasks)}: up to {config.tasks_limit:,} items each, asked {len(steps):,} times")
    summary = train(
        decoder,
        source,
        config,
        out,
        runtime=runtime,
        seed=seed,
        on_step_end=on_step_end,
        progress=progress,
        description=description,
        mesh=mesh,
        load=load,
        folder=folder,
        peak_flops=device_peak(out, runtime, card_flops) if mesh.leads else None,
        **options,
    )
    best = summary.get("best_step")
    counts = {"parameters": decoder.config.parameters()}
    if config.low_rank is None:
        save_trained(decoder, out, tokenizer=model, mesh=mesh, config=config, best=best)
    else:
        save_trained_adapter(decoder, config.low_rank, out, start=model, mesh=mesh, config=config, best=best)
        counts["adapter_parameters"] = sum(
            parameter.numel() for update in adapters_of(decoder).values() for parameter in update.parameters()
        )
    return {**counts, **summary}


def _then(first: Load, second: Callable[[PreparedModel], object]) -> Load:
    def both(prepared: PreparedModel) -> None:
        first(prepared)
        second(prepared)

    return both


def _steps_with_tasks(config: LoopConfig) -> frozenset[int]:
    """The steps after which the tasks are asked; the last one always."""
    assert config.steps is not None
    return validated_steps(config) if config.tasks_every is None else multiples(config.tasks_every, config.steps)


def _both(first: OnStepEnd, second: OnStepEnd) -> OnStepEnd:
    return lambda finished, trainer: first(finished, trainer) | second(finished, trainer)


def validation_metrics(trainer: Trainer, source: BatchSource, steps: int) -> dict[str, float]:
    """`validation_loss`, the objective's loss over the first `steps` batches of a source, and its figures as
    `validation_NAME`."""
    totals = trainer.evaluate(trainer.read(source, step) for step in range(steps))
    figures = {f"validation_{name}": value for name, value in totals.metrics.items()}
    return {"validation_loss": totals.loss, **figures}
