"""The stage `sft`: supervised fine-tuning of a pretrained model on conversations.

Conversations come from files, functions, earlier stages, documentation, and from the items of tasks with their right
answers. Rows of the run's token shards may be mixed in and are learnt whole: a model that learns to answer forgets some of
what it was pretrained on (as in Ouyang et al. 2022, section 3.5, where the gradient of pretraining is mixed into tuning).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.usercode import is_user_function
from bessemer.data.corpus.reader import TRAIN, VALIDATION
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.decoder import Decoder
from bessemer.model.storage.model_config import read_decoder_config
from bessemer.posttraining.data.examples import (
    BAD_ROWS,
    Conversation,
    RowReader,
    made_conversations,
    read_conversations,
    write_conversations,
)
from bessemer.posttraining.data.made import DOCS_QUESTIONS, MADE_DATA, TASK, data_path
from bessemer.posttraining.data.packing import PackedBatches, PackedConversations, pack_conversations, validation_on
from bessemer.posttraining.data.picture_encoding import PICTURES, open_picture_encoder
from bessemer.posttraining.data.splitting import are_held_out, opening_key, opening_of
from bessemer.posttraining.data.template_record import keep_template
from bessemer.posttraining.picture_memory import say_step_memory
from bessemer.posttraining.sft.config import SFTConfig
from bessemer.posttraining.synthetic.documentation import make_questions
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.questions import GenerationTask
from bessemer.tasks.registry import find_tasks
from bessemer.tokenization.shards import TokenShards
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.tokenization.trained_template import extended_tokenizers
from bessemer.training.autotune import RunCost, seconds_per_step
from bessemer.training.data.batch import Batch, concatenated
from bessemer.training.data.batches import BatchSource, StatelessBatches, TokenBatches
from bessemer.training.data.pictures import PictureTable
from bessemer.training.head import target_log_probs
from bessemer.training.job import RunContext, RunOptions, TrainingHooks, TrainingJob
from bessemer.training.keeping import losses_held_out
from bessemer.training.loop import OnStepEnd, no_metrics
from bessemer.training.objectives import NextTokenObjective
from bessemer.training.trainer import Trainer


def dynamic_fine_tuning(model: Decoder, hidden_BTD: Tensor, targets_BT: Tensor, z_loss: float) -> Tensor:
    """Sum over the targets of −sg(p) log p, with sg(p) the probability without a gradient (Wu et al. 2025, arXiv 2508.05629,
    eq. 9): its gradient is that of −p. A `SummedLoss`; z_loss must be 0."""
    assert not z_loss
    log_probs_BT, _ = target_log_probs(model, hidden_BTD, targets_BT)
    return -(log_probs_BT.detach().exp() * log_probs_BT).sum()


def add_embedding_noise(model: Decoder, alpha: float) -> None:
    """Add uniform noise within ± alpha / √(T D) to embedded tokens in training, for T tokens of a row and D channels (Jain et
    al. 2023, "NEFTune", algorithm 1)."""

    def add_noise(module: nn.Module, inputs: tuple[Tensor, ...], embedded_BTD: Tensor) -> Tensor:
        if not module.training:
            return embedded_BTD
        tokens, channels = embedded_BTD.shape[-2:]
        return embedded_BTD + torch.empty_like(embedded_BTD).uniform_(-1, 1) * (alpha / (tokens * channels) ** 0.5)

    model.embed_tokens.register_forward_hook(add_noise)


class MixedBatches(StatelessBatches):
    """Batches of packed conversations in which a share of the rows is plain text, spread evenly over the run."""

    def __init__(self, conversations: PackedBatches, text: TokenBatches, share: float, batch_size: int) -> None:
        """conversations, text: in batches of one row, whose steps are the rows' positions."""
        assert conversations.batch_size == text.batch_size == 1
        self.batch_size = batch_size
        self._conversations = conversations
        self._text = text
        self._share = share
        self.fingerprint = hash_value([conversations.fingerprint, text.fingerprint, share, batch_size])

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        texts_before = np.floor(positions * self._share).astype(np.int64)
        is_text = np.floor((positions + 1) * self._share) > texts_before
        return concatenated(
            [
                _as_packed(self._text.batch(before), self._conversations.pictures)
                if text
                else self._conversations.batch(position - before)
                for position, before, text in zip(positions.tolist(), texts_before.tolist(), is_text.tolist(), strict=True)
            ]
        )


def _as_packed(batch: Batch, pictures: PictureTable | None) -> Batch:
    """Rows of text as packed rows of one document each, beside rows with pictures."""
    rows, columns = batch.tokens_BT.shape
    packed = replace(
        batch,
        positions_BT=torch.arange(columns).expand(rows, columns),
        document_ids_BT=torch.ones_like(batch.tokens_BT),
    )
    return packed if pictures is None else packed.showing(pictures, torch.full_like(batch.tokens_BT, -1))


def task_conversations(name: str, count: int) -> list[Conversation]:
    """The first `count` items of a task as conversations: the question as the user's message, then the right answer. Raises
    ConfigError for an unknown task, one that generates nothing, or one without right answers.
    """
    (task,) = find_tasks([name], TaskOptions(chat=True, limit=count))
    if not isinstance(task, GenerationTask):
        raise ConfigError(f"data: the task {name} is asked by likelihood; there are no answers of it to learn")
    conversations = []
    for question in task.questions():
        answer = task.reference(question)
        if answer is None or isinstance(question.context, str):
            raise ConfigError(f"data: the task {name} knows no right answers that could be learnt")
        messages = (*map(dict, question.context), {"role": "assistant", "content": answer})
        conversations.append(Conversation.of(messages, TASK + name))
    return conversations


def sft(
    config: SFTConfig,
    model: Path,
    documents: Path | None,
    out: Path,
    *,
    tokens: Path | None = None,
    made: Mapping[str, Path] | None = None,
    on_validation: Callable[[int, Decoder], None] | None = None,
    only_resolve: bool = False,
    shows_data: bool = True,
    **options: Unpack[RunOptions],
) -> dict[str, Any]:
    """Fine-tune the model of folder `model` on conversations; resumes from `out`.

    Writes below `out`: `model/`, `metrics.jsonl`, `autotune.json`, `checkpoints/`, and the training and held-out conversations,
    `conversations/{train,validation}.jsonl`. tokens: the run's token shards, for rows of plain text. Files named in the
    settings are relative to `folder`. made: files of stages above, by their names in `data`. on_validation: receives the
    finished steps and the model in training, with its adapter beside the weights where it has one, in one process.
    only_resolve: measure, and raise SettingsResolvedError with the settings. shows_data: say what was understood of the data.
    Returns the headline metrics. Raises SourceError
    for conversations that are missing or malformed, and what `TrainingJob` raises.
    """
    run = RunContext(out, **options)
    tokenizer = load_tokenizer(model)
    config = config.fitted_to(read_decoder_config(model).max_position_embeddings)
    reader = RowReader(config.on_bad_row, run.progress.say if shows_data else lambda line: None)
    training, held_out = gather_conversations(config, documents, run.folder, run.seed, made, reader)
    pictures = open_picture_encoder(model, tokenizer, out / PICTURES)
    packed, validation = (
        pack_conversations(some, tokenizer, config.context_length, config.truncate, pictures) for some in (training, held_out)
    )
    if pictures is not None:
        packed, validation = (replace(one, batch=pictures.placed(one.batch)) for one in (packed, validation))
    for sentence in packed.counts.sentences(f"{len(training):,} conversations"):
        run.progress.say(sentence)
    if not packed.rows:
        raise SourceError(
            f"none of the {len(training):,} conversations has something to learn within {config.context_length:,} tokens; "
            "raise context_length"
        )
    if config.steps is None:
        rows = math.ceil(config.epochs * packed.rows / (1 - config.pretraining_share))
        config = config.with_changes(steps=config.batch_sizes.steps_for(rows))
    shards = None
    if config.pretraining_share:
        if tokens is None:
            raise SourceError("pretraining_share: no stage of this recipe makes tokens, whose text would be mixed in")
        shards = TokenShards(tokens / TRAIN)
        shards.check_tokenizer(tokenizer.hash, "the model", extended_tokenizers(tokenizer.folder))

    cost = RunCost(validation.batch.tokens_BT.numel())
    if packed.batch.pictures is not None:
        if shows_data and not dist.is_initialized():
            say_step_memory(run.progress.say, config, model, packed.batch, run.device)
        # random tokens, by which steps are timed else, have no pictures
        trial = partial(_trial, model=model, packed=packed, options=run.trial_options)
        cost = replace(cost, seconds_per_step=lambda config: seconds_per_step(trial, config))
    job = TrainingJob.open(config, model, run, description="fine-tune", cost=cost, only_resolve=only_resolve)
    config, mesh = job.config, job.mesh
    if mesh.leads:
        write_conversations(out / "conversations" / "train.jsonl", training)
        write_conversations(out / "conversations" / "validation.jsonl", held_out)
        reader.write_bad_rows(out / BAD_ROWS)

    def validate(decoder: Decoder) -> OnStepEnd:
        if config.neftune_alpha is not None:
            if not mesh.alone:
                raise ConfigError("neftune_alpha: in one process; leave it out under a mesh")
            add_embedding_noise(decoder, config.neftune_alpha)
        if not validation.rows:
            return no_metrics
        measure = validation_on(validation.batch, config)

        def measure_and_show(finished: int, trainer: Trainer) -> dict[str, float]:
            metrics = measure(finished, trainer)
            if metrics and on_validation is not None and mesh.alone:
                with trainer.runtime.evaluating(decoder), torch.random.fork_rng():
                    on_validation(finished, decoder)
            return metrics

        return measure_and_show

    objective = None
    if config.loss == "dft":
        objective = NextTokenObjective(read_decoder_config(model), training_loss=dynamic_fine_tuning)
    hooks = TrainingHooks(validate, held_out=losses_held_out(validation.batch, config))
    summary = job.train(_source(config, packed, shards, run.seed), objective=objective, hooks=hooks)
    if mesh.leads:
        keep_template(out, tokenizer)
    if pictures is not None:
        pictures.file.close()
    return {
        "conversations": len(training),
        "held_out": len(held_out),
        **reader.figures,
        **packed.counts.figures,
        "rows": packed.rows,
        "filled": round(packed.filled, 4),
        **{name: value for name, value in summary.items() if name != "parameters"},
    }


def _trial(config: SFTConfig, out: Path, *, model: Path, packed: PackedConversations, options: RunOptions) -> None:
    """A short run on the same rows, of which the steps are timed."""
    run = RunContext(out, **options)
    job = TrainingJob.open(config, model, run, description="measure")
    job.train(_source(config, packed, None, run.seed))


def _source(config: SFTConfig, packed: PackedConversations, shards: TokenShards | None, seed: int) -> BatchSource:
    """A source of packed conversations, mixed with rows of text if there are token shards."""
    order = derive_seed(seed, "batches")
    if shards is None:
        return PackedBatches(packed.batch, batch_size=config.batch_size, seed=order)
    text = TokenBatches(shards, batch_size=1, context_length=config.context_length, seed=derive_seed(seed, "text"))
    conversations = PackedBatches(packed.batch, batch_size=1, seed=order)
    return MixedBatches(conversations, text, config.pretraining_share, config.batch_size)


def gather_conversations(
    config: SFTConfig,
    documents: Path | None,
    folder: Path,
    seed: int,
    made: Mapping[str, Path] | None = None,
    reader: RowReader | None = None,
) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out) conversations of all data that the settings name; no held-out one has the opening of a training one.
    Raises SourceError, and ConfigError for an unknown task or function, and for a task whose answers are not known."""
    reader = reader or RowReader(config.on_bad_row)
    sets = [(name, _conversations_of(name, config, documents, folder, seed, made or {}, reader)) for name in config.data]
    # over all sets at once, since one question may be in two of them
    openings = [opening_of(one.answered) for _, given in sets for one in given.to_split]
    sides = iter(are_held_out(openings, config.validation_share, seed))
    training: list[Conversation] = []
    held_out: list[Conversation] = []
    for name, given in sets:
        split = [(one, next(sides)) for one in given.to_split]
        own = [*given.training, *(one for one, is_held_out in split if not is_held_out)]
        training += _weighted(own, config.weights.get(name, 1.0), seed)
        held_out += [*given.held_out, *(one for one, is_held_out in split if is_held_out)]
    learnt = {opening_key(opening_of(one.answered)) for one in training}
    return training, [one for one in held_out if opening_key(opening_of(one.answered)) not in learnt]


class _Set(NamedTuple):
    """Conversations of one set of data: already split ones, and those still to be split."""

    training: Sequence[Conversation] = ()
    held_out: Sequence[Conversation] = ()
    to_split: Sequence[Conversation] = ()


def _conversations_of(
    name: str,
    config: SFTConfig,
    documents: Path | None,
    folder: Path,
    seed: int,
    made: Mapping[str, Path],
    reader: RowReader,
) -> _Set:
    if name == DOCS_QUESTIONS:
        if documents is None:
            raise SourceError(f"{DOCS_QUESTIONS} is made from documents, and no stage of this recipe makes any")
        questions = make_questions(documents, TRAIN, config.train_questions, seed)
        if not questions:
            raise SourceError(
                f"{documents}: no question can be made from it; {DOCS_QUESTIONS} needs documentation of functions and "
                "classes, as the sources wheels and python_docs give it"
            )
        return _Set(questions, make_questions(documents, VALIDATION, config.validation_questions, seed))
    if name.startswith(TASK):
        return _Set(task_conversations(name.removeprefix(TASK), config.task_items))
    if name in MADE_DATA:
        return _Set(to_split=read_conversations(data_path(name, folder, made)))
    if is_user_function(name):
        return _Set(to_split=made_conversations(name, folder, config.columns, reader))
    return _Set(to_split=read_conversations(data_path(name, folder, made), config.columns, reader))


def _weighted(conversations: list[Conversation], weight: float, seed: int) -> list[Conversation]:
    """Conversations repeated `weight` times; the fraction of the weight repeats those with the smallest hashes once more."""
    whole = int(weight)
    more = round(len(conversations) * (weight - whole))
    by_chance = sorted(conversations, key=lambda one: derive_seed(seed, "weights", one.id)) if more else []
    return conversations * whole + by_chance[:more]
