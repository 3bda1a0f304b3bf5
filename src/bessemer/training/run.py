"""A run of a method of training, from a model's folder to the trained one: what all stages that train have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bessemer.core.progress import Progress
from bessemer.core.stage import OpenTasks
from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.model.folder_config import read_model_config
from bessemer.model.trained_adapters import adapters_of, without_adapters
from bessemer.training.autotune import Plan, prepare_run
from bessemer.training.checkpoint.export import save_trained, save_trained_adapter
from bessemer.training.config import LoopConfig
from bessemer.training.data.batches import BatchSource
from bessemer.training.loop import train
from bessemer.training.model_setup import PreparedModel
from bessemer.training.monitoring.peak_flops import device_peak
from bessemer.training.optim.lr_schedule import multiples, validated_steps
from bessemer.training.starting_model import Load, open_start
from bessemer.training.task_scores import PeriodicTasks, check_processes, open_tasks
from bessemer.training.trainer import Trainer

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
