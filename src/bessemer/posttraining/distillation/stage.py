"""The stage `distillation`: a student learns from a teacher.

It learns from text, from answers of the data or the teacher's, or from its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch.distributed as dist

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.hashing import derive_seed
from bessemer.core.progress import Progress
from bessemer.data.corpus.reader import TRAIN, VALIDATION
from bessemer.model.decoder import Decoder
from bessemer.posttraining.data.encoding import RowFitter
from bessemer.posttraining.data.examples import (
    Conversation,
    RowReader,
    drawn,
    prompt_key,
    read_conversations,
    write_conversations,
)
from bessemer.posttraining.data.made import data_path
from bessemer.posttraining.data.packing import (
    EncodedExample,
    PackedBatches,
    PackedConversations,
    pack_conversations,
    pack_examples,
    validation_on,
)
from bessemer.posttraining.data.splitting import opening_of, split_examples
from bessemer.posttraining.data.template_record import keep_template
from bessemer.posttraining.distillation.answers import (
    HeldOutDivergence,
    StudentBatches,
    TeacherAnswer,
    before_last_answer,
    encoded_prompts,
    gather_prompts,
    sample_answers,
)
from bessemer.posttraining.distillation.config import CROSS_ENTROPY, POLICY_GRADIENT, DistillationConfig
from bessemer.posttraining.distillation.objective import (
    TEACHER,
    DistillationObjective,
    OnPolicyObjective,
    TeacherHead,
    incomparable,
)
from bessemer.posttraining.distillation.teacher_server import TeacherServer
from bessemer.posttraining.sampling.samples import Prompt
from bessemer.tokenization.shards import TokenShards
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.autotune import RunCost, seconds_per_step
from bessemer.training.data.batches import BatchSource, TokenBatches
from bessemer.training.job import RunContext, RunOptions, TrainingHooks, TrainingJob
from bessemer.training.loop import OnStepEnd, no_metrics
from bessemer.training.objectives import Objective
from bessemer.training.trainer import Trainer
from bessemer.training.validation import bits_per_byte


@dataclass(frozen=True)
class Material:
    """Data of a run. steps: number of steps of the epochs in the settings. batches: makes the source of batches, given resolved
    settings. validate: makes the hook that validates. held_out: prompts that the student answers at each validation. summary:
    figures of the data."""

    steps: int
    batches: Callable[[DistillationConfig], BatchSource]
    validate: Callable[[DistillationConfig, Decoder], OnStepEnd]
    held_out: Sequence[Prompt] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)


def text_material(config: DistillationConfig, tokens: Path, tokenizer: Tokenizer, seed: int) -> Material:
    """Windows of a run's token shards. Validated in bits per byte, the teacher's beside the student's.

    Raises ArtefactError for tokens of another tokenizer, and for too few.
    """
    shards, validation = TokenShards(tokens / TRAIN), TokenShards(tokens / VALIDATION)
    for each in (shards, validation):
        each.check_tokenizer(tokenizer.hash, "the model")

    def batches(config: DistillationConfig) -> TokenBatches:
        return TokenBatches(
            shards,
            batch_size=config.batch_size,
            context_length=config.context_length,
            seed=derive_seed(seed, "batches"),
        )

    def validate(config: DistillationConfig, decoder: Decoder) -> OnStepEnd:
        validated, of_teacher = config.validated_steps, dict[str, float]()

        def score(model: Decoder, trainer: Trainer, **options: Any) -> float:
            score = bits_per_byte(
                model,
                validation,
                context_length=config.context_length,
                batch_size=config.batch_size,
                max_tokens=config.evaluate_tokens,
                device=trainer.runtime.device,
                **options,
            )
            return score.bits_per_byte

        def on_step_end(finished: int, trainer: Trainer) -> dict[str, float]:
            if finished not in validated:
                return {}
            if not of_teacher:
                with trainer.models.prepared(TEACHER) as teacher:
                    of_teacher["teacher_bits_per_byte"] = score(teacher.model, trainer)
            with trainer.runtime.evaluating(decoder):
                own = score(decoder, trainer, likelihood=trainer.negative_log_likelihood)
            return {"bits_per_byte": own, **of_teacher}

        return on_step_end

    return Material(_steps(config, batches(config).rows), batches, validate)


def answered_material(
    config: DistillationConfig, tokenizer: Tokenizer, folder: Path, seed: int, progress: Progress
) -> Material:
    """The answers of the data. Raises SourceError for rows that are malformed or too long."""
    reader = RowReader(config.on_bad_row, progress.say)
    conversations = [one for name in config.data for one in read_conversations(data_path(name, folder, {}), reader=reader)]
    training, held_out = split_examples(conversations, lambda one: opening_of(one.answered), config.validation_share, seed)

    def packed(some: Sequence[Conversation]) -> PackedConversations:
        return pack_conversations(some, tokenizer, config.context_length, config.truncate)

    prompts = [one for conversation in held_out if (one := before_last_answer(conversation.answered)) is not None]
    return _packed_material(config, packed(training), packed(held_out), prompts, seed, progress)


def taught_material(config: DistillationConfig, teacher: Path, tokenizer: Tokenizer, run: RunContext) -> Material:
    """Answers that the teacher samples. Those that ended are also written as `conversations/{train,validation}.jsonl`, which
    `sft` reads. Raises SourceError and ConfigError, as `sample_answers`."""
    training, held_out = _prompts(config, run.folder, run.seed, run.progress)
    answers = sample_answers(
        config, teacher, [*training, *held_out], run.out, seed=run.seed, device=run.device, progress=run.progress
    )
    kept = {prompt_key(prompt.turns) for prompt in held_out}
    sides: dict[str, list[TeacherAnswer]] = {"train": [], "validation": []}
    for answer in answers:
        sides["validation" if prompt_key(answer.prompt.turns) in kept else "train"].append(answer)
    for name, some in sides.items():
        write_conversations(run.out / "conversations" / f"{name}.jsonl", [one.conversation for one in some if not one.is_cut])

    def packed(some: Sequence[TeacherAnswer]) -> PackedConversations:
        fitter = RowFitter(config.context_length, config.truncate)
        fitted = [fitter.fit(partial(one.encoded, tokenizer)) for one in some]
        examples = [EncodedExample(*rows[0]) for rows in fitted if rows is not None]
        return PackedConversations(pack_examples(examples, tokenizer, config.context_length), fitter.counts("answers"))

    material = _packed_material(config, packed(sides["train"]), packed(sides["validation"]), held_out, run.seed, run.progress)
    cut = sum(one.is_cut for one in answers)
    return replace(material, summary={"answers": len(answers), "cut": cut, **material.summary})


def own_material(config: DistillationConfig, tokenizer: Tokenizer, folder: Path, seed: int, progress: Progress) -> Material:
    """Answers that the student samples at each step. Raises SourceError for prompts that are malformed or too long."""
    training, held_out = _prompts(config, folder, seed, progress)
    prompts = encoded_prompts(training, tokenizer, config)
    if len(prompts) < len(training):
        progress.say(
            f"  {len(training) - len(prompts):,} of {len(training):,} prompts are left out: they have more than "
            f"{config.context_length - config.max_tokens:,} tokens, context_length without max_tokens"
        )
    if not prompts:
        raise SourceError("no prompt is left to train on; raise context_length, or lower max_tokens")

    def batches(config: DistillationConfig) -> StudentBatches:
        teacher = None if config.teacher_server is None else TeacherServer(config.teacher_server, tokenizer)
        return StudentBatches(prompts, tokenizer, config, derive_seed(seed, "student"), teacher)

    return Material(
        math.ceil(config.epochs * len(prompts) / config.groups),
        batches,
        lambda config, decoder: no_metrics,
        held_out,
        {"prompts": len(prompts), "held_out": len(held_out)},
    )


def with_held_out_divergence(
    validate: OnStepEnd,
    held_out: Sequence[Prompt],
    tokenizer: Tokenizer,
    config: DistillationConfig,
    teacher: TeacherHead,
    seed: int,
) -> OnStepEnd:
    """A validation with `validation_reverse_kl` beside it, on the student's answers to held-out prompts."""
    prompts = drawn(encoded_prompts(held_out, tokenizer, config), config.validation_limit, derive_seed(seed, "validation"))
    if not prompts:
        return validate
    divergence = HeldOutDivergence(prompts, tokenizer, config, teacher, derive_seed(seed, "held out"))
    validated = config.validated_steps

    def on_step_end(finished: int, trainer: Trainer) -> dict[str, float]:
        metrics = validate(finished, trainer)
        return metrics | {"validation_reverse_kl": divergence.measure(trainer.models)} if finished in validated else metrics

    return on_step_end


def _packed_material(
    config: DistillationConfig,
    training: PackedConversations,
    held_out: PackedConversations,
    prompts: Sequence[Prompt],
    seed: int,
    progress: Progress,
) -> Material:
    for sentence in training.counts.sentences("the answers"):
        progress.say(sentence)
    if not training.rows:
        raise SourceError(
            f"no answer to train on is within {config.context_length:,} tokens; raise context_length, or lower validation_share"
        )
    return Material(
        _steps(config, training.rows),
        lambda config: PackedBatches(training.batch, batch_size=config.batch_size, seed=derive_seed(seed, "batches")),
        lambda config, decoder: validation_on(held_out.batch, config),
        prompts,
        {**training.counts.figures, "rows": training.rows, "filled": round(training.filled, 4)},
    )


def _prompts(config: DistillationConfig, folder: Path, seed: int, progress: Progress) -> tuple[list[Prompt], list[Prompt]]:
    training, held_out = gather_prompts(config, folder, seed, RowReader(config.on_bad_row, progress.say))
    if not training:
        raise SourceError("no prompt is left to train on; give more rows, or lower validation_share")
    return training, held_out


def _steps(config: DistillationConfig, rows: int) -> int:
    return config.batch_sizes.steps_for(math.ceil(config.epochs * rows))


#: Metrics that are left out of the summary: throughput ignores the time in which answers are sampled.
_WITHOUT = {"parameters", "tokens_per_second", "gflops", "mfu"}


def distill(
    config: DistillationConfig,
    model: Path,
    teacher: Path | None,
    out: Path,
    *,
    tokens: Path | None = None,
    **options: Unpack[RunOptions],
) -> dict[str, Any]:
    """Train the model of folder `model`, the student, on what that of folder `teacher` knows, or the server of the settings;
    resumes from `out`.

    Writes below `out`: `model/`, `metrics.jsonl`, `autotune.json`, `checkpoints/`; with the teacher's answers also
    `teacher_answers.jsonl` and `conversations/`. tokens: the run's token shards, where no data is named. Files that the
    settings name are relative to `folder`. Returns the headline metrics. Raises ConfigError for a teacher whose distributions
    cannot be compared with the student's where the loss does that, and for a teacher that is to answer in several processes;
    SourceError for data that is missing or malformed, and what `TrainingJob` raises.
    """
    run = RunContext(out, **options)
    tokenizer = load_tokenizer(model)
    assert (teacher is None) == (config.teacher_server is not None), "a folder or a server"
    reason = "a server gives no distributions" if teacher is None else incomparable(config, model, teacher)
    if reason is not None and config.loss != CROSS_ENTROPY and teacher is not None:
        raise ConfigError(reason)
    if config.answers == "teacher" and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            f"answers: teacher are sampled in one process, before training, and {dist.get_world_size()} were started; start it "
            "in one"
        )
    material = _material(config, tokenizer, teacher, tokens, run)
    if config.steps is None:
        config = config.with_changes(steps=material.steps)

    def trial(config: DistillationConfig, out: Path) -> object:
        return distill(config, model, teacher, out, tokens=tokens, **run.trial_options)

    # a short trial run would make the teacher write all its answers
    cost = RunCost() if config.answers == "teacher" else RunCost(seconds_per_step=partial(seconds_per_step, trial))
    job = TrainingJob.open(config, model, run, description="distillation", cost=cost)
    config, mesh = job.config, job.mesh
    # the student's own answers are compared with the teacher at each validation, whatever it learns from
    compared = bool(config.validation_limit and material.held_out) and reason is None
    others = []
    head: TeacherHead | None = None
    if teacher is not None and (config.loss != CROSS_ENTROPY or compared):
        other = job.other(TEACHER, teacher)
        head = TeacherHead.of(other.decoder, mesh) if other.load is None else TeacherHead.read(teacher, job.runtime.device)
        others = [other]
    source = material.batches(config)

    def validate(decoder: Decoder) -> OnStepEnd:
        measure = material.validate(config, decoder)
        if compared and head is not None:
            measure = with_held_out_divergence(measure, material.held_out, tokenizer, config, head, run.seed)

        def on_step_end(finished: int, trainer: Trainer) -> dict[str, float]:
            sampled = source.take_metrics() if isinstance(source, StudentBatches) else {}
            return sampled | measure(finished, trainer)

        return on_step_end

    summary = job.train(source, objective=_objective(config, head), others=others, hooks=TrainingHooks(validate))
    if mesh.leads and config.data:
        keep_template(out, tokenizer)
    without = _WITHOUT if config.answers == "student" else {"parameters"}
    return {**material.summary, **{name: value for name, value in summary.items() if name not in without}}


def _material(
    config: DistillationConfig, tokenizer: Tokenizer, teacher: Path | None, tokens: Path | None, run: RunContext
) -> Material:
    if not config.data:
        if tokens is None:
            raise SourceError("distillation: name files in data, or add a stage that makes tokens, whose text is learnt")
        return text_material(config, tokens, tokenizer, run.seed)
    if config.answers == "data":
        return answered_material(config, tokenizer, run.folder, run.seed, run.progress)
    if config.answers == "teacher":
        assert teacher is not None, "the settings take no server that answers"
        return taught_material(config, teacher, tokenizer, run)
    return own_material(config, tokenizer, run.folder, run.seed, run.progress)


def _objective(config: DistillationConfig, teacher: TeacherHead | None) -> Objective | None:
    """None: next-token prediction."""
    if config.loss == CROSS_ENTROPY:
        return None
    if config.loss == POLICY_GRADIENT:
        baseline = config.baseline == "mean"
        return OnPolicyObjective(config.sampling_temperature, config.batch_size, config.max_tokens, baseline=baseline)
    assert teacher is not None
    return DistillationObjective.of(config, teacher)
