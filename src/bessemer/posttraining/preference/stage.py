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
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bessemer.core.errors import SourceError
from bessemer.core.hashing import derive_seed, hash_bytes, hash_value
from bessemer.core.progress import Progress, Silent
from bessemer.core.stage import OpenTasks
from bessemer.core.store import new_file
from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.posttraining.chat_models import place_fingerprint
from bessemer.posttraining.data.examples import gather_pairs, prompt_key, read_examples
from bessemer.posttraining.data.formats import as_labelled_answers
from bessemer.posttraining.data.made import data_path
from bessemer.posttraining.data.packing import (
    PackedBatches,
    can_share_prompts,
    has_mismatched,
    mismatched,
    pack_answers,
    pack_pairs,
    validation_on,
)
from bessemer.posttraining.data.splitting import opening_of, split_examples
from bessemer.posttraining.preference.config import KTO, PAIR_LOSSES, PreferenceConfig
from bessemer.posttraining.preference.losses import PairLossSettings
from bessemer.posttraining.preference.objective import (
    MISMATCHED_REFERENCE,
    REFERENCE_LOG_PROBS,
    KTOObjective,
    PreferenceObjective,
)
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.autotune import Plan, prepare_run
from bessemer.training.data.batches import Batch, BatchSource
from bessemer.training.job import OnStepEnd, run_training
from bessemer.training.model_roles import REFERENCE, Trainee
from bessemer.training.model_setup import PreparedModel, open_beside, starting_model
from bessemer.training.objectives import POLICY, Objective
from bessemer.training.runtime import Runtime

#: Key of a file's metadata that says what its log-probabilities are of, and what they depend on beside the reference.
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
    """A packed data set, training or validation, with what its objective asks of the reference, which `load` gives, from files
    in `out`. identity: of the reference; what was computed with another one, or for other rows, is computed again."""

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

    found = of(batch, "")
    if not has_mismatched(batch):
        return found
    twins = of(mismatched(batch), "-mismatched")
    return found.with_values(per_token={MISMATCHED_REFERENCE: twins.per_token[REFERENCE_LOG_PROBS]})


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
    of = {_OF: hash_value([identity, *(_hash(getattr(batch, name)) for name in _ROWS)])}
    if path.exists():
        with safe_open(path, "pt") as file:
            is_ours = file.metadata() == of
        if is_ours:
            return batch.with_values(per_token=load_file(path))
    rows = batch.tokens_BT.shape[0]
    with runtime.running():
        trainee = Trainee({POLICY: PreparedModel(load(), None)}, runtime)
        parts = []
        with progress.task(description, total=rows, unit="rows") as bar, torch.no_grad():
            for start in range(0, rows, rows_at_once):
                part = batch.rows(slice(start, start + rows_at_once))
                parts.append(trainee.log_probs(part, POLICY))
                bar.advance(len(parts[-1]))
    found = {REFERENCE_LOG_PROBS: torch.cat(parts).contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        save_file(found, unfinished, metadata=of)
    return replace(batch, per_token={**batch.per_token, **found})


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


def paired_data(config: PreferenceConfig, model: Path, folder: Path, made: Mapping[str, Path], seed: int) -> PreferenceData:
    """The pairs that the settings name, packed for the model of a folder, with the objective of their loss. Raises
    SourceError."""
    loss = PAIR_LOSSES.find(config.loss).load()
    training, held_out = gather_pairs(config.data, folder, made, config.validation_share, seed)
    if not loss.soft_labels and any(pair.confidence < 1 for pair in (*training, *held_out)):
        raise SourceError(
            f"the pairs have a confidence, which the loss {config.loss} cannot use; take sigmoid, sigmoid_norm or simpo, or "
            "leave the column out"
        )
    tokenizer, shares = load_tokenizer(model), can_share_prompts(config, model)
    packed, validation = (
        pack_pairs(some, tokenizer, config.context_length, config.truncate, shares_prompts=shares)
        for some in (training, held_out)
    )
    settings = PairLossSettings(config.beta, config.label_smoothing, config.margin)
    return PreferenceData(
        name="pairs",
        objective=PreferenceObjective(loss, settings, config.next_token_weight),
        needs_reference=loss.needs_reference,
        longest=config.context_length // 2,
        training=packed.batch,
        training_examples=packed.pairs,
        validation=validation.batch,
        validation_examples=validation.pairs,
        left_out=packed.sentences(f"{len(training):,} pairs"),
        figures=packed.figures,
    )


def labelled_data(config: PreferenceConfig, model: Path, folder: Path, made: Mapping[str, Path], seed: int) -> PreferenceData:
    """The single answers that the settings name, those of pairs among them, packed for KTO. Raises SourceError."""
    rows = [row for name in config.data for row in read_examples(data_path(name, folder, made), as_labelled_answers)]
    answers = [answer for row in rows for answer in row]
    training, held_out = split_examples(answers, lambda one: opening_of(one.answered), config.validation_share, seed)
    if len({prompt_key(one.answered.prompt) for one in held_out}) == 1:
        # with a single prompt there is nothing to compare its answers with
        training, held_out = answers, []
    tokenizer = load_tokenizer(model)
    packed, validation = (pack_answers(some, tokenizer, config.context_length) for some in (training, held_out))
    return PreferenceData(
        name="answers",
        objective=KTOObjective(config.beta, config.desirable_weight, config.undesirable_weight),
        needs_reference=True,
        longest=config.context_length,
        training=packed.batch,
        training_examples=packed.answers,
        validation=validation.batch,
        validation_examples=validation.answers,
        left_out=packed.counts.sentences(f"{len(training):,} answers"),
        figures=packed.counts.figures,
    )


def preference(
    config: PreferenceConfig,
    model: Path,
    out: Path,
    *,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
    folder: Path = Path(),
    card_flops: Callable[[str], float | None] = lambda name: None,
    tasks: OpenTasks | None = None,
    made: Mapping[str, Path] | None = None,
    only_resolve: bool = False,
) -> dict[str, Any]:
    """Train the model of folder `model` on pairs of answers, with `kto` on single ones; resumes from `out`.

    Writes below `out`: `model/`, `metrics.jsonl`, `autotune.json`, `checkpoints/`, and the reference's log-probabilities. The
    reference is the model as it was: on several processes it is held beside the policy, or is the policy without its adapter.
    Files named in the settings are relative to `folder`. made: files that stages above have made, by their names in `data`.

    only_resolve: measure, and raise SettingsResolvedError with the settings. Returns the headline metrics. Raises SourceError
    for pairs that are missing or malformed, and what `run_training` raises.
    """
    progress = progress or Silent()
    gather = labelled_data if config.loss == KTO else paired_data
    data = gather(config, model, folder, made or {}, seed)
    for sentence in data.left_out:
        progress.say(sentence)
    if not data.rows:
        raise SourceError(
            f"none of the {data.name} to train on has different answers that end within {data.longest:,} tokens; raise "
            "context_length"
        )
    if config.steps is None:
        config = config.with_changes(steps=config.batch_sizes.steps_for(math.ceil(config.epochs * data.rows)))
    sets = {"training": data.training, "validation": data.validation}
    # the reference reads both once
    read_once = sum(batch.tokens_BT.numel() for batch in sets.values()) if data.needs_reference else 0
    plan = Plan(data.validation.tokens_BT.numel(), read_once)
    config, runtime, mesh = prepare_run(
        config, model, out, device=device, progress=progress, folder=folder, plan=plan, only_resolve=only_resolve
    )
    options: dict[str, Any] = {}
    if data.needs_reference and mesh.alone:
        rows_at_once = config.micro_batch_size or config.batch_size
        quantize = None if config.adapter is None else config.adapter.quantize
        identity = hash_value([place_fingerprint(model), quantize, runtime.dtype])
        for name, batch in sets.items():
            if batch.tokens_BT.shape[0]:
                load = partial(starting_model, model, config, runtime.device, seed)
                sets[name] = cached(
                    batch, name, load, out, runtime, identity=identity, rows_at_once=rows_at_once, progress=progress
                )
    elif data.needs_reference and config.adapter is None:
        reference, load_reference = open_beside(model, runtime.device, mesh)
        options |= {"frozen": {REFERENCE: reference}, "load_others": {REFERENCE: load_reference}}

    def batches(config: PreferenceConfig, mesh: Mesh) -> BatchSource:
        return PackedBatches(sets["training"], batch_size=config.batch_size, seed=derive_seed(seed, "batches"))

    def prepare(config: PreferenceConfig, decoder: Decoder, mesh: Mesh) -> OnStepEnd:
        return validation_on(sets["validation"], config)

    summary = run_training(
        config,
        model,
        out,
        batches,
        seed=seed,
        device=device,
        progress=progress,
        description="preference",
        folder=folder,
        card_flops=card_flops,
        prepare=prepare,
        tasks=tasks,
        objective=data.objective,
        **options,
    )
    return {
        data.name: data.training_examples,
        "held_out": data.validation_examples,
        **data.figures,
        "rows": data.rows,
        **{name: value for name, value in summary.items() if name != "parameters"},
    }
