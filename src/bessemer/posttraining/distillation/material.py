"""What a run of the stage `distillation` learns from and is validated on: text, answers of the data or the teacher's, or the
student's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.progress import Progress
from bessemer.core.seeds import derive_seed
from bessemer.data.corpus.reader import TRAIN, VALIDATION
from bessemer.model.decoder import Decoder
from bessemer.posttraining.conversations import Conversation, read_conversations, write_conversations
from bessemer.posttraining.dataset import drawn, prompt_key
from bessemer.posttraining.distillation.config import DistillationConfig
from bessemer.posttraining.distillation.prompts import Asked, before_last_answer, encoded_prompts, gather_prompts
from bessemer.posttraining.distillation.student_samples import HeldOutDivergence, StudentBatches
from bessemer.posttraining.distillation.teacher import TEACHER, TeacherHead
from bessemer.posttraining.distillation.teacher_answers import TeacherAnswer, sample_answers
from bessemer.posttraining.encoding import RowFitter
from bessemer.posttraining.packing import (
    Example,
    PackedBatches,
    PackedConversations,
    pack_conversations,
    pack_examples,
    validation_on,
)
from bessemer.posttraining.splits import opening_of, split_examples
from bessemer.tokenization.shards import TokenShards
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import BatchSource, TokenBatches
from bessemer.training.optim.lr_schedule import validated_steps
from bessemer.training.run import OnStepEnd
from bessemer.training.trainer import Trainer
from bessemer.training.validation import bits_per_byte


@dataclass(frozen=True)
class Material:
    """steps: of the epochs that the settings name. batches: of a run with resolved settings. validate: its metrics by step.
    held_out: prompts that the student is to answer at each validation. summary: figures of the data."""

    steps: int
    batches: Callable[[DistillationConfig], BatchSource]
    validate: Callable[[DistillationConfig, Decoder], OnStepEnd]
    held_out: Sequence[Asked] = ()
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
        validated, of_teacher = validated_steps(config), dict[str, float]()

        def score(model: Decoder, trainer: Trainer, **options: Any) -> float:
            found = bits_per_byte(
                model,
                validation,
                context_length=config.context_length,
                batch_size=config.batch_size,
                max_tokens=config.evaluate_tokens,
                device=trainer.runtime.device,
                **options,
            )
            return found.bits_per_byte

        def on_step_end(finished: int, trainer: Trainer) -> dict[str, float]:
            if finished not in validated:
                return {}
            if not of_teacher:
                with trainer.trainee.prepared(TEACHER) as teacher:
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
    conversations = [one for name in config.data for one in read_conversations(folder / name)]
    training, held_out = split_examples(conversations, lambda one: opening_of(one.answered), config.validation_share, seed)

    def packed(some: Sequence[Conversation]) -> PackedConversations:
        return pack_conversations(some, tokenizer, config.context_length, config.truncate)

    asked = [one for conversation in held_out if (one := before_last_answer(conversation.answered)) is not None]
    return _packed_material(config, packed(training), packed(held_out), asked, seed, progress)


def taught_material(
    config: DistillationConfig,
    teacher: Path,
    tokenizer: Tokenizer,
    out: Path,
    *,
    seed: int,
    folder: Path,
    device: str,
    progress: Progress,
) -> Material:
    """Answers that the teacher samples. Those that ended are also written as `conversations/{train,validation}.jsonl`, which
    `sft` reads. Raises SourceError and ConfigError, as `sample_answers`."""
    training, held_out = _prompts(config, folder, seed)
    answers = sample_answers(config, teacher, [*training, *held_out], out, seed=seed, device=device, progress=progress)
    kept = {prompt_key(one.prompt) for one in held_out}
    sides: dict[str, list[TeacherAnswer]] = {"train": [], "validation": []}
    for answer in answers:
        sides["validation" if prompt_key(answer.asked.prompt) in kept else "train"].append(answer)
    for name, some in sides.items():
        write_conversations(out / "conversations" / f"{name}.jsonl", [one.conversation for one in some if not one.is_cut])

    def packed(some: Sequence[TeacherAnswer]) -> PackedConversations:
        fitter = RowFitter(config.context_length, config.truncate)
        fitted = [fitter.fit(partial(one.encoded, tokenizer)) for one in some]
        examples = [Example(*rows[0]) for rows in fitted if rows is not None]
        return PackedConversations(pack_examples(examples, tokenizer, config.context_length), fitter.counts("answers"))

    material = _packed_material(config, packed(sides["train"]), packed(sides["validation"]), held_out, seed, progress)
    cut = sum(one.is_cut for one in answers)
    return Material(
        material.steps,
        material.batches,
        material.validate,
        material.held_out,
        {"answers": len(answers), "cut": cut, **material.summary},
    )


def own_material(config: DistillationConfig, tokenizer: Tokenizer, folder: Path, seed: int, progress: Progress) -> Material:
    """Answers that the student samples at each step. Raises SourceError for prompts that are malformed or too long."""
    training, held_out = _prompts(config, folder, seed)
    prompts = encoded_prompts(training, tokenizer, config)
    if len(prompts) < len(training):
        progress.say(
            f"  {len(training) - len(prompts):,} of {len(training):,} prompts are left out: they have more than "
            f"{config.context_length - config.max_tokens:,} tokens, context_length without max_tokens"
        )
    if not prompts:
        raise SourceError("no prompt is left to train on; raise context_length, or lower max_tokens")

    def batches(config: DistillationConfig) -> StudentBatches:
        return StudentBatches(prompts, tokenizer, config, derive_seed(seed, "student"))

    return Material(
        math.ceil(config.epochs * len(prompts) / config.groups),
        batches,
        lambda config, decoder: lambda finished, trainer: {},
        held_out,
        {"prompts": len(prompts), "held_out": len(held_out)},
    )


def with_held_out_divergence(
    validate: OnStepEnd,
    held_out: Sequence[Asked],
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
    validated = validated_steps(config)

    def on_step_end(finished: int, trainer: Trainer) -> dict[str, float]:
        metrics = validate(finished, trainer)
        return metrics | {"validation_reverse_kl": divergence.measure(trainer.trainee)} if finished in validated else metrics

    return on_step_end


def _packed_material(
    config: DistillationConfig,
    training: PackedConversations,
    held_out: PackedConversations,
    asked: Sequence[Asked],
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
        asked,
        {**training.counts.figures, "rows": training.rows, "filled": round(training.filled, 4)},
    )


def _prompts(config: DistillationConfig, folder: Path, seed: int) -> tuple[list[Asked], list[Asked]]:
    training, held_out = gather_prompts(config, folder, seed)
    if not training:
        raise SourceError("no prompt is left to train on; give more rows, or lower validation_share")
    return training, held_out


def _steps(config: DistillationConfig, rows: int) -> int:
    return config.batch_sizes.steps_for(math.ceil(config.epochs * rows))
