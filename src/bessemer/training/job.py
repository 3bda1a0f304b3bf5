"""A training job, from a model's folder to the trained one: what all methods of training share.

Methods differ in their source of batches, their objective, the models beside the policy, and what they validate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Required, Self, TypedDict, TypeVar

from bessemer.core.progress import Progress, Silent
from bessemer.core.stage import OpenTasks, TaskScorer
from bessemer.distributed.mesh import Mesh
from bessemer.model.adapters.trained import adapters_of
from bessemer.model.decoder import Decoder
from bessemer.model.storage.model_config import read_decoder_config
from bessemer.training.autotune import RunCost, prepare_run
from bessemer.training.checkpoint.export import save_trained, save_trained_adapter
from bessemer.training.config import LoopConfig
from bessemer.training.data.batches import BatchSource
from bessemer.training.keeping import HeldOut, Keeper
from bessemer.training.loop import OnStepEnd, no_metrics, train
from bessemer.training.model_roles import OtherModel
from bessemer.training.model_setup import Load, PreparedModel
from bessemer.training.monitoring.profiler import device_peak
from bessemer.training.monitoring.run_metrics import PeriodicTasks, ThroughputCheck, check_processes, open_tasks
from bessemer.training.objectives import LossFunction, Objective
from bessemer.training.optim.lr_schedule import multiples
from bessemer.training.runtime import Runtime
from bessemer.training.starting_model import StartingModel, open_beside

SomeConfig = TypeVar("SomeConfig", bound=LoopConfig)


class RunOptions(TypedDict, total=False):
    """Options that the functions of all training stages take; as in `RunContext`."""

    seed: Required[int]
    device: str
    progress: Progress
    folder: Path
    card_flops: Callable[[str], float | None]
    tasks: OpenTasks | None


@dataclass(frozen=True)
class RunContext:
    """Output folder, seed, device and services of a run.

    folder: where files that the settings name lie. card_flops: peak FLOP/s of a GPU by its name; None: unknown. tasks: opens
    the tasks that the settings name.
    """

    out: Path
    seed: int
    device: str = "auto"
    progress: Progress = field(default_factory=Silent)
    folder: Path = Path()
    card_flops: Callable[[str], float | None] = lambda name: None
    tasks: OpenTasks | None = None

    def __post_init__(self) -> None:
        # untyped callers may pass None
        object.__setattr__(self, "progress", self.progress or Silent())

    @property
    def trial_options(self) -> RunOptions:
        """Options of a short run that is only timed: without progress and tasks."""
        return RunOptions(seed=self.seed, device=self.device, folder=self.folder, card_flops=self.card_flops)


@dataclass(frozen=True)
class TrainingHooks:
    """Functions and checks that a stage adds to a run.

    validate: from the model, which has its weights only when training begins, to what is called after each step. initialise:
    changes the loaded weights, of the whole model or of this process's shards. checkpoint_source, throughput_check: as of
    `train`. held_out: what both models are asked where the settings compare them (`keep_better`).
    """

    validate: Callable[[Decoder], OnStepEnd] = lambda decoder: no_metrics
    initialise: Callable[[Decoder], object] | None = None
    checkpoint_source: Path | None = None
    throughput_check: ThroughputCheck | None = None
    held_out: HeldOut | None = None


@dataclass
class TrainingJob(Generic[SomeConfig]):
    """One run: opened, which decides its settings, and then trained once."""

    config: SomeConfig
    start: StartingModel
    run: RunContext
    runtime: Runtime
    mesh: Mesh
    description: str
    _scorer: TaskScorer | None
    _keeper: Keeper | None
    _is_trained: bool = False

    @classmethod
    def open(
        cls,
        config: SomeConfig,
        model: Path,
        run: RunContext,
        *,
        description: str,
        cost: RunCost | None = None,
        only_resolve: bool = False,
    ) -> Self:
        """The job that trains the model of a folder, with settings whose steps, dtype and compilation are decided.

        cost, only_resolve: as in `prepare_run`. Raises as that, and ConfigError or ArtefactError for tasks that cannot be
        asked.
        """
        scorer = open_tasks(config, run.folder, run.tasks)
        if scorer is not None:
            scorer.check(model, read_decoder_config(model).max_position_embeddings)
        resolved, runtime, mesh = prepare_run(
            config,
            model,
            run.out,
            device=run.device,
            progress=run.progress,
            folder=run.folder,
            cost=cost,
            only_resolve=only_resolve,
        )
        start = StartingModel.of(model, resolved, run.seed)
        keeper = Keeper.open(resolved, start, runtime, mesh, run.out, run.progress, folder=run.folder, tasks=run.tasks)
        return cls(resolved, start, run, runtime, mesh, description, scorer, keeper)

    def other(
        self,
        role: str,
        folder: Path,
        *,
        trained: bool = False,
        settings: LoopConfig | None = None,
        seed_of_head: int | None = None,
    ) -> OtherModel:
        """The model of a folder for a role beside the policy. seed_of_head: as in `open_beside`, which raises."""
        decoder, load = open_beside(folder, self.runtime.device, self.mesh, seed_of_head=seed_of_head)
        return OtherModel(role, decoder, load, trained, settings)

    def train(
        self,
        source: BatchSource,
        *,
        objective: Objective | LossFunction | None = None,
        others: Sequence[OtherModel] = (),
        hooks: TrainingHooks = TrainingHooks(),
    ) -> dict[str, Any]:
        """Train, and write `out/model`, with an adapter `out/adapter`, resuming from `out`; the headline metrics. Where the
        settings compare the two, these hold the better one of the trained model and the one before.

        The model is opened here, and not with the job: what a stage computes before with another one is then gone from memory.
        Raises what `loop.train` raises.
        """
        assert not self._is_trained, "a job trains once"
        self._is_trained = True
        if self._keeper is not None:
            self._keeper.check(hooks.held_out)
        metrics = self._trained(source, objective, others, hooks)
        return metrics if self._keeper is None else {**metrics, **self._keeper.keep(hooks.held_out)}

    def _trained(
        self,
        source: BatchSource,
        objective: Objective | LossFunction | None,
        others: Sequence[OtherModel],
        hooks: TrainingHooks,
    ) -> dict[str, Any]:
        config, run, runtime, mesh, start = self.config, self.run, self.runtime, self.mesh, self.start
        decoder, load = start.open(runtime.device, mesh)
        if hooks.initialise is not None:
            if load is None:
                hooks.initialise(decoder)
            else:
                load = _initialised(load, hooks.initialise)
        on_step_end = self._with_tasks(decoder, hooks.validate(decoder))
        summary = train(
            decoder,
            source,
            config,
            run.out,
            runtime=runtime,
            seed=run.seed,
            objective=objective,
            others=others,
            on_step_end=on_step_end,
            progress=run.progress,
            description=self.description,
            mesh=mesh,
            load=load,
            checkpoint_source=hooks.checkpoint_source,
            folder=run.folder,
            peak_flops=device_peak(run.out, runtime, run.card_flops) if mesh.leads else None,
            throughput_check=hooks.throughput_check,
        )
        best = summary.get("best_step")
        counts = {"parameters": decoder.config.parameters()}
        if start.adapter is None:
            save_trained(decoder, run.out, tokenizer=start.folder, mesh=mesh, config=config, best=best)
        else:
            save_trained_adapter(decoder, start, run.out, mesh=mesh, config=config, best=best)
            counts["adapter_parameters"] = sum(
                parameter.numel() for update in adapters_of(decoder).values() for parameter in update.parameters()
            )
        return {**counts, **summary}

    def _with_tasks(self, decoder: Decoder, on_step_end: OnStepEnd) -> OnStepEnd:
        """`on_step_end` and the accuracies on the tasks that the settings name; in one process."""
        config, scorer = self.config, self._scorer
        if scorer is None:
            return on_step_end
        check_processes(self.mesh.layout.world_size)
        assert config.steps is not None
        steps = config.validated_steps if config.tasks_every is None else multiples(config.tasks_every, config.steps)
        score = PeriodicTasks(scorer, decoder, self.start.folder, steps)
        self.run.progress.say(
            f"  {', '.join(config.tasks)}: up to {config.tasks_limit:,} items each, asked {len(steps):,} times"
        )
        return lambda finished, trainer: on_step_end(finished, trainer) | score(finished, trainer)


def _initialised(load: Load, initialise: Callable[[Decoder], object]) -> Load:
    def load_and_initialise(prepared: PreparedModel) -> None:
        load(prepared)
        initialise(prepared.model)

    return load_and_initialise
