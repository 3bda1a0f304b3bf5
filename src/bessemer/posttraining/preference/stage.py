"""The stage `preference`: a model learns which of two answers is preferred."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bessemer.core.errors import SourceError
from bessemer.core.progress import Progress, Silent
from bessemer.core.seeds import derive_seed
from bessemer.core.stage import OpenTasks
from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.model.folder import load_model
from bessemer.posttraining.dataset import prompt_key, read_examples, split_examples
from bessemer.posttraining.formats import as_pair
from bessemer.posttraining.packing import HeldOutBatches, PackedBatches
from bessemer.posttraining.preference.config import PreferenceConfig
from bessemer.posttraining.preference.losses import PairLossSettings
from bessemer.posttraining.preference.objective import PreferenceObjective
from bessemer.posttraining.preference.packing import pack_pairs
from bessemer.posttraining.preference.reference import with_reference
from bessemer.posttraining.preference.registry import PAIR_LOSSES
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.autotune import prepare_run
from bessemer.training.data.batches import BatchSource
from bessemer.training.run import OnStepEnd, run_training, validated_steps, validation_metrics
from bessemer.training.trainee import REFERENCE


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
) -> dict[str, Any]:
    """Train the model of folder `model` on pairs of answers; resumes from `out`.

    Writes below `out`: `model/`, `metrics.jsonl`, `autotune.json`, `checkpoints/`, and the reference's log-probabilities. The
    reference is the model as it was; on several processes it is held beside the policy. Files named in the settings are
    relative to `folder`. Returns the headline metrics. Raises SourceError for pairs that are missing or malformed, and what
    `run_training` raises.
    """
    progress = progress or Silent()
    tokenizer = load_tokenizer(model)
    loss = PAIR_LOSSES.find(config.loss).load()
    pairs = [pair for name in config.data for pair in read_examples(folder / name, as_pair)]
    training, held_out = split_examples(pairs, prompt_key, config.validation_share, seed)
    packed = pack_pairs(training, tokenizer, config.context_length)
    validation = pack_pairs(held_out, tokenizer, config.context_length)
    if packed.skipped:
        progress.say(
            f"  {packed.skipped:,} of {len(training):,} pairs are left out: an answer does not begin within "
            f"{config.context_length // 2:,} tokens, half a row"
        )
    if not packed.rows:
        raise SourceError(
            f"none of the {len(pairs):,} pairs has both answers within {config.context_length // 2:,} tokens; raise "
            "context_length"
        )
    if config.steps is None:
        config = config.with_changes(steps=config.batch_sizes.steps_for(math.ceil(config.epochs * packed.rows)))
    config, runtime, mesh = prepare_run(config, model, out, device=device, progress=progress, folder=folder)
    sets = {"training": packed.batch, "validation": validation.batch}
    options: dict[str, Any] = {}
    if loss.needs_reference and mesh.alone:
        rows_at_once = config.micro_batch_size or config.batch_size
        for name, batch in sets.items():
            if batch.tokens_BT.shape[0]:
                sets[name] = with_reference(
                    batch,
                    model,
                    out / f"reference-{name}.safetensors",
                    runtime,
                    rows_at_once=rows_at_once,
                    description=f"reference ({name})",
                    progress=progress,
                )
    elif loss.needs_reference:
        options["frozen"] = {REFERENCE: load_model(model, device=runtime.device, dtype=torch.float32)}

    def batches(config: PreferenceConfig, mesh: Mesh) -> BatchSource:
        return PackedBatches(sets["training"], batch_size=config.batch_size, seed=derive_seed(seed, "batches"))

    def prepare(config: PreferenceConfig, decoder: Decoder, mesh: Mesh) -> OnStepEnd:
        if not validation.rows:
            return lambda finished, trainer: {}
        source = HeldOutBatches(sets["validation"], config.batch_size)
        validated = validated_steps(config)
        return lambda finished, trainer: validation_metrics(trainer, source, source.steps) if finished in validated else {}

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
        objective=PreferenceObjective(
            loss, PairLossSettings(config.beta, config.label_smoothing, config.margin), config.next_token_weight
        ),
        **options,
    )
    return {
        "pairs": packed.pairs,
        "held_out": validation.pairs,
        "skipped": packed.skipped + validation.skipped,
        "rows": packed.rows,
        **{name: value for name, value in summary.items() if name != "parameters"},
    }
