"""The stage `distillation`: a model learns from another one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.progress import Progress, Silent
from bessemer.core.stage import OpenTasks
from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.posttraining.distillation.config import DistillationConfig
from bessemer.posttraining.distillation.material import (
    Material,
    answered_material,
    own_material,
    taught_material,
    text_material,
    with_held_out_divergence,
)
from bessemer.posttraining.distillation.objective import DistillationObjective, OnPolicyObjective
from bessemer.posttraining.distillation.registry import CROSS_ENTROPY, POLICY_GRADIENT
from bessemer.posttraining.distillation.student_samples import StudentBatches
from bessemer.posttraining.distillation.teacher import TEACHER, TeacherHead, incomparable
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.autotune import Plan, prepare_run, seconds_per_step
from bessemer.training.data.batches import BatchSource
from bessemer.training.objectives import Objective
from bessemer.training.run import OnStepEnd, run_training
from bessemer.training.starting_model import open_beside
from bessemer.training.trainer import Trainer

#: Of the sum of rows' tokens, which says nothing of answers that are sampled between steps.
_WITHOUT = {"parameters", "tokens_per_second", "gflops", "mfu"}


def distill(
    config: DistillationConfig,
    model: Path,
    teacher: Path,
    out: Path,
    *,
    tokens: Path | None = None,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
    folder: Path = Path(),
    card_flops: Callable[[str], float | None] = lambda name: None,
    tasks: OpenTasks | None = None,
) -> dict[str, Any]:
    """Train the model of folder `model`, the student, on what that of folder `teacher` knows; resumes from `out`.

    Writes below `out`: `model/`, `metrics.jsonl`, `autotune.json`, `checkpoints/`; with the teacher's answers also
    `teacher_answers.jsonl` and `conversations/`. tokens: the run's token shards, where no data is named. Files that the
    settings name are relative to `folder`. Returns the headline metrics. Raises ConfigError for a teacher whose distributions
    cannot be compared with the student's where the loss does that, and for answers that are sampled in several processes;
    SourceError for data that is missing or malformed, and what `run_training` raises.
    """
    progress = progress or Silent()
    tokenizer = load_tokenizer(model)
    reason = incomparable(config, model, teacher)
    if reason is not None and config.loss != CROSS_ENTROPY:
        raise ConfigError(reason)
    if config.answers != "data" and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            f"answers: {config.answers} are sampled in one process, and {dist.get_world_size()} were started; start it in one"
        )
    material = _material(config, tokenizer, teacher, out, tokens, seed=seed, folder=folder, device=device, progress=progress)
    if config.steps is None:
        config = config.with_changes(steps=material.steps)

    def again(config: DistillationConfig, out: Path) -> object:
        return distill(
            config, model, teacher, out, tokens=tokens, seed=seed, device=device, folder=folder, card_flops=card_flops
        )

    config, runtime, mesh = prepare_run(
        config,
        model,
        out,
        device=device,
        progress=progress,
        folder=folder,
        # a short run would have the teacher write all its answers again
        plan=Plan() if config.answers == "teacher" else Plan(seconds_per_step=partial(seconds_per_step, again)),
    )
    # with its own words the student is compared with the teacher at each validation, whatever it learns from
    compared = mesh.alone and bool(config.validation_limit and material.held_out) and reason is None
    options: dict[str, Any] = {}
    head: TeacherHead | None = None
    if config.loss != CROSS_ENTROPY or compared:
        decoder, load = open_beside(teacher, runtime.device, mesh)
        head = TeacherHead.of(decoder, mesh) if load is None else TeacherHead.read(teacher, runtime.device)
        options |= {"frozen": {TEACHER: decoder}, "load_others": {TEACHER: load}}
    if (objective := _objective(config, head)) is not None:
        options["objective"] = objective
    source: BatchSource | None = None

    def batches(config: DistillationConfig, mesh: Mesh) -> BatchSource:
        nonlocal source
        source = material.batches(config)
        return source

    def prepare(config: DistillationConfig, decoder: Decoder, mesh: Mesh) -> OnStepEnd:
        validate = material.validate(config, decoder)
        if compared and head is not None:
            validate = with_held_out_divergence(validate, material.held_out, tokenizer, config, head, seed)

        def on_step_end(finished: int, trainer: Trainer) -> dict[str, float]:
            sampled = source.take_metrics() if isinstance(source, StudentBatches) else {}
            return sampled | validate(finished, trainer)

        return on_step_end

    summary = run_training(
        config,
        model,
        out,
        batches,
        seed=seed,
        device=device,
        progress=progress,
        description="distillation",
        folder=folder,
        card_flops=card_flops,
        prepare=prepare,
        tasks=tasks,
        **options,
    )
    without = _WITHOUT if config.answers == "student" else {"parameters"}
    return {**material.summary, **{name: value for name, value in summary.items() if name not in without}}


def _material(
    config: DistillationConfig,
    tokenizer: Tokenizer,
    teacher: Path,
    out: Path,
    tokens: Path | None,
    *,
    seed: int,
    folder: Path,
    device: str,
    progress: Progress,
) -> Material:
    if not config.data:
        if tokens is None:
            raise SourceError("distillation: name files in data, or add a stage that makes tokens, whose text is learnt")
        return text_material(config, tokens, tokenizer, seed)
    if config.answers == "data":
        return answered_material(config, tokenizer, folder, seed, progress)
    if config.answers == "teacher":
        return taught_material(config, teacher, tokenizer, out, seed=seed, folder=folder, device=device, progress=progress)
    return own_material(config, tokenizer, folder, seed, progress)


def _objective(config: DistillationConfig, teacher: TeacherHead | None) -> Objective | None:
    """None: next-token prediction."""
    if config.loss == CROSS_ENTROPY:
        return None
    if config.loss == POLICY_GRADIENT:
        baseline = config.baseline == "mean"
        return OnPolicyObjective(config.sampling_temperature, config.batch_size, config.max_tokens, baseline=baseline)
    assert teacher is not None
    return DistillationObjective.of(config, teacher)
