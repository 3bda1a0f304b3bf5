"""The stage `preference`: a model learns which of two answers is preferred, or which answers are good.

Pairs or single answers are packed, and split by prompt. The model that a run starts from is its reference. Before the first
step, while its weights are those, it computes its log-probabilities of all answers, which are kept beside the run; then no
second model is held in memory and no step runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bessemer.core.errors import SourceError
from bessemer.core.hashing import derive_seed, hash_bytes, hash_value
from bessemer.core.progress import Progress
from bessemer.core.store import new_file
from bessemer.model.decoder import Decoder
from bessemer.posttraining.chat_models import place_fingerprint
from bessemer.posttraining.data.examples import BAD_ROWS, RowReader, folder_of, gather_pairs, prompt_key, read_examples
from bessemer.posttraining.data.formats import Labelled, as_labelled_answers
from bessemer.posttraining.data.made import data_path
from bessemer.posttraining.data.packing import (
    PackedBatches,
    can_share_prompts,
    has_mismatched,
    mismatched,
    pack_answers,
    pack_forgetting,
    pack_pairs,
    placed,
    validation_on,
)
from bessemer.posttraining.data.picture_encoding import PICTURES, PictureEncoder, open_picture_encoder
from bessemer.posttraining.data.splitting import opening_of, split_examples
from bessemer.posttraining.data.template_record import keep_template
from bessemer.posttraining.picture_memory import say_step_memory
from bessemer.posttraining.preference.config import KTO, NPO, PAIR_LOSSES, PreferenceConfig
from bessemer.posttraining.preference.losses import PairLossSettings
from bessemer.posttraining.preference.objective import (
    MISMATCHED_REFERENCE,
    REFERENCE_LOG_PROBS,
    KTOObjective,
    PreferenceObjective,
    UnlearningObjective,
)
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.autotune import RunCost
from bessemer.training.data.batch import Batch
from bessemer.training.job import RunContext, RunOptions, TrainingHooks, TrainingJob
from bessemer.training.keeping import losses_held_out
from bessemer.training.model_roles import POLICY, REFERENCE, ModelRoles
from bessemer.training.model_setup import PreparedModel
from bessemer.training.objectives import Objective
from bessemer.training.runtime import Runtime

#: Metadata key of the hash of everything on which a file's log-probabilities depend; and the fields of a batch that enter it.
_OF, _ROWS = "log_probabilities_of", ("tokens_BT", "targets_BT", "positions_BT", "document_ids_BT")


def _hash(values: Tensor | None) -> str:
    return "" if values is None else hash_bytes(str(tuple(values.shape)).encode(), values.contiguous().numpy().tobytes())


def cached(
    batch: Batch,
    name: str,
    load: Callable[[], Decoder],
    out: Path,
    runtime: Runtime,
    *,
    identity: str,
    rows_at_once: int,
    progress: Progress,
) -> Batch:
    """A packed data set, training or validation, with the reference's log-probabilities for its objective, kept in files
    in `out`. load: opens the reference. identity: its hash; with another one, or other rows, all is computed again."""

    def of(rows: Batch, kind: str) -> Batch:
        return with_reference(
            rows,
            load,
            out / f"reference-{name}{kind}.safetensors",
            runtime,
            identity=identity,
            rows_at_once=rows_at_once,
            description=f"reference ({name}{kind})",
            progress=progress,
        )

    own = of(batch, "")
    if not has_mismatched(batch):
        return own
    twins = of(mismatched(batch), "-mismatched")
    return own.with_values(per_token={MISMATCHED_REFERENCE: twins.per_token[REFERENCE_LOG_PROBS]})


def with_reference(
    batch: Batch,
    load: Callable[[], Decoder],
    path: Path,
    runtime: Runtime,
    *,
    identity: str,
    rows_at_once: int,
    description: str,
    progress: Progress,
) -> Batch:
    """A packed data set with the log-probabilities of the model that `load` gives, (B, T), read from `path` where an earlier
    start of the run has left them."""
    seen = [] if batch.pictures is None else [_hash(batch.vector_of_token_BT), batch.pictures.fingerprint]
    of = {_OF: hash_value([identity, *(_hash(getattr(batch, name)) for name in _ROWS), *seen])}
    if path.exists():
        with safe_open(path, "pt") as file:
            is_ours = file.metadata() == of
        if is_ours:
            return batch.with_values(per_token=load_file(path))
    rows = batch.tokens_BT.shape[0]
    with runtime.running():
        models = ModelRoles({POLICY: PreparedModel(load(), None)}, runtime)
        parts = []
        with progress.task(description, total=rows, unit="rows") as bar, torch.no_grad():
            for start in range(0, rows, rows_at_once):
                part = batch.rows(slice(start, start + rows_at_once))
                parts.append(models.log_probs(part, POLICY))
                bar.advance(len(parts[-1]))
    log_probs = {REFERENCE_LOG_PROBS: torch.cat(parts).contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        save_file(log_probs, unfinished, metadata=of)
    return replace(batch, per_token={**batch.per_token, **log_probs})


@dataclass(frozen=True)
class PreferenceData:
    """Packed examples of a run, and the objective that learns from them.

    name: of an example, in the plural. longest: tokens within which an answer must end. left_out: a sentence on each kind of
    examples to train on that are not, or not whole. figures: their numbers.
    """

    name: str
    objective: Objective
    needs_reference: bool
    longest: int
    training: Batch
    training_examples: int
    validation: Batch
    validation_examples: int
    left_out: list[str]
    figures: dict[str, int]

    @property
    def rows(self) -> int:
        """Rows to train on."""
        return self.training.tokens_BT.shape[0]


@dataclass(frozen=True)
class ModelReader:
    """What the model of a folder, the one that a run starts from, reads rows with. pictures: of a model that reads them."""

    model: Path
    tokenizer: Tokenizer
    rows: RowReader | None = None
    pictures: PictureEncoder | None = None

    @classmethod
    def of(cls, model: Path, out: Path, rows: RowReader | None = None) -> Self:
        """out: the folder of the run, which takes the pixels of pictures."""
        tokenizer = load_tokenizer(model)
        return cls(model, tokenizer, rows, open_picture_encoder(model, tokenizer, out / PICTURES))

    def close(self) -> None:
        """Remove the file of pixels."""
        if self.pictures is not None:
            self.pictures.file.close()


def paired_data(
    config: PreferenceConfig, reader: ModelReader, folder: Path, made: Mapping[str, Path], seed: int
) -> PreferenceData:
    """The pairs that the settings name, packed for the reader's model, with the objective of their loss. Raises
    SourceError."""
    loss = PAIR_LOSSES.find(config.loss).load()
    training, held_out = gather_pairs(config.data, folder, made, config.validation_share, seed, reader.rows, pictures=True)
    if not loss.soft_labels and any(pair.confidence < 1 for pair in (*training, *held_out)):
        raise SourceError(
            f"the pairs have a confidence, which the loss {config.loss} cannot use; take sigmoid, sigmoid_norm or simpo, or "
            "leave the column out"
        )
    tokenizer, pictures, shares = reader.tokenizer, reader.pictures, can_share_prompts(config, reader.model)
    packed, validation = (
        pack_pairs(some, tokenizer, config.context_length, config.truncate, shares_prompts=shares, pictures=pictures)
        for some in (training, held_out)
    )
    settings = PairLossSettings(config.beta, config.label_smoothing, config.margin)
    return PreferenceData(
        name="pairs",
        objective=PreferenceObjective(loss, settings, config.next_token_weight),
        needs_reference=loss.needs_reference,
        longest=config.context_length // 2,
        training=placed(packed.batch, reader.pictures),
        training_examples=packed.pairs,
        validation=placed(validation.batch, reader.pictures),
        validation_examples=validation.pairs,
        left_out=packed.sentences(f"{len(training):,} pairs"),
        figures=packed.figures,
    )


def labelled_data(
    config: PreferenceConfig, reader: ModelReader, folder: Path, made: Mapping[str, Path], seed: int
) -> PreferenceData:
    """The single answers that the settings name, those of pairs among them, packed for KTO. Raises SourceError."""
    answers = _labelled_answers(config, folder, made, reader.rows)
    training, held_out = split_examples(answers, lambda one: opening_of(one.answered), config.validation_share, seed)
    if len({prompt_key(one.answered.prompt) for one in held_out}) == 1:
        # KTO compares with answers to other prompts, and a single held-out prompt has none
        training, held_out = answers, []
    packed, validation = (
        pack_answers(some, reader.tokenizer, config.context_length, pictures=reader.pictures) for some in (training, held_out)
    )
    return PreferenceData(
        name="answers",
        objective=KTOObjective(config.beta, config.desirable_weight, config.undesirable_weight),
        needs_reference=True,
        longest=config.context_length,
        training=placed(packed.batch, reader.pictures),
        training_examples=packed.answers,
        validation=placed(validation.batch, reader.pictures),
        validation_examples=validation.answers,
        left_out=packed.counts.sentences(f"{len(training):,} answers"),
        figures=packed.counts.figures,
    )


def forgetting_data(
    config: PreferenceConfig, reader: ModelReader, folder: Path, made: Mapping[str, Path], seed: int
) -> PreferenceData:
    """The single answers that the settings name, packed for NPO: those whose label is false are forgotten, all of them, and of
    the others, which are kept, a share is held out. Raises SourceError where there is nothing to forget."""
    answers = _labelled_answers(config, folder, made, reader.rows)
    forget = [one for one in answers if not one.is_desirable]
    if not forget:
        raise SourceError(f"loss {NPO} forgets answers whose label is false, and there are none")
    keep, held_out = split_examples(
        [one for one in answers if one.is_desirable], lambda one: opening_of(one.answered), config.validation_share, seed
    )
    packed, validation = (
        pack_forgetting(*some, reader.tokenizer, config.context_length, config.truncate, reader.pictures)
        for some in ((forget, keep), ([], held_out))
    )
    return PreferenceData(
        name="answers",
        objective=UnlearningObjective(config.beta, config.retain_weight),
        needs_reference=True,
        longest=config.context_length,
        training=placed(packed.batch, reader.pictures),
        training_examples=packed.answers,
        validation=placed(validation.batch, reader.pictures),
        validation_examples=validation.answers,
        left_out=packed.counts.sentences(f"{len(forget) + len(keep):,} answers"),
        figures={**packed.counts.figures, "forgotten": len(forget), "kept": len(keep)},
    )


def _labelled_answers(
    config: PreferenceConfig, folder: Path, made: Mapping[str, Path], reader: RowReader | None
) -> list[Labelled]:
    parse = partial(as_labelled_answers, pictures=True)
    places = [data_path(name, folder, made) for name in config.data]
    return [
        replace(answer, folder=folder_of(place))
        for place in places
        for row in read_examples(place, parse, reader)
        for answer in row
    ]


#: Losses of single answers → what gathers their data; all others are losses of pairs.
_OF_SINGLE_ANSWERS = {KTO: labelled_data, NPO: forgetting_data}


def preference(
    config: PreferenceConfig,
    model: Path,
    out: Path,
    *,
    made: Mapping[str, Path] | None = None,
    only_resolve: bool = False,
    **options: Unpack[RunOptions],
) -> dict[str, Any]:
    """Train the model of folder `model` on pairs of answers, with `kto` and `npo` on single ones; resumes from `out`.

    Writes below `out`: `model/`, `metrics.jsonl`, `autotune.json`, `checkpoints/`, and the reference's log-probabilities. The
    reference is the model as it was: on several processes it is held beside the policy, or is the policy without its adapter.
    Files named in the settings are relative to `folder`. made: files that stages above have made, by their names in `data`.

    only_resolve: measure, and raise SettingsResolvedError with the settings. Returns the headline metrics. Raises SourceError
    for pairs that are missing or malformed, and what `TrainingJob` raises.
    """
    run = RunContext(out, **options)
    gather = _OF_SINGLE_ANSWERS.get(config.loss, paired_data)
    rows = RowReader(config.on_bad_row, run.progress.say)
    reader = ModelReader.of(model, out, rows)
    data = gather(config, reader, run.folder, made or {}, run.seed)
    for sentence in data.left_out:
        run.progress.say(sentence)
    if not data.rows:
        raise SourceError(
            f"none of the {data.name} to train on has different answers that end within {data.longest:,} tokens; raise "
            "context_length"
        )
    if config.steps is None:
        config = config.with_changes(steps=config.batch_sizes.steps_for(math.ceil(config.epochs * data.rows)))
    if data.training.pictures is not None and not dist.is_initialized():
        say_step_memory(run.progress.say, config, model, data.training, run.device)
    # the reference reads both sets once
    read_once = data.training.tokens_BT.numel() + data.validation.tokens_BT.numel() if data.needs_reference else 0
    cost = RunCost(data.validation.tokens_BT.numel(), read_once)
    job = TrainingJob.open(config, model, run, description="preference", cost=cost, only_resolve=only_resolve)
    config = job.config
    if job.mesh.leads:
        rows.write_bad_rows(out / BAD_ROWS)
    others = []
    if data.needs_reference and job.mesh.alone:
        data = _with_cached_reference(data, job)
    elif data.needs_reference and config.adapter is None:
        others = [job.other(REFERENCE, model)]
    summary = job.train(
        PackedBatches(data.training, batch_size=config.batch_size, seed=derive_seed(run.seed, "batches")),
        objective=data.objective,
        others=others,
        hooks=TrainingHooks(
            lambda decoder: validation_on(data.validation, config),
            held_out=losses_held_out(data.validation, config, data.objective),
        ),
    )
    if job.mesh.leads:
        keep_template(out, reader.tokenizer)
    reader.close()
    return {
        data.name: data.training_examples,
        "held_out": data.validation_examples,
        **rows.figures,
        **data.figures,
        "rows": data.rows,
        **{name: value for name, value in summary.items() if name != "parameters"},
    }


def _with_cached_reference(data: PreferenceData, job: TrainingJob[PreferenceConfig]) -> PreferenceData:
    """Both sets with the log-probabilities of the model that the run starts from."""
    config, start, run = job.config, job.start, job.run
    quantize = None if config.adapter is None else config.adapter.quantize
    identity = hash_value([place_fingerprint(start.folder), quantize, job.runtime.dtype])

    def compute(batch: Batch, name: str) -> Batch:
        if not batch.tokens_BT.shape[0]:
            return batch
        return cached(
            batch,
            name,
            partial(start.whole, job.runtime.device),
            run.out,
            job.runtime,
            identity=identity,
            rows_at_once=config.micro_batch_size or config.batch_size,
            progress=run.progress,
        )

    return replace(data, training=compute(data.training, "training"), validation=compute(data.validation, "validation"))
