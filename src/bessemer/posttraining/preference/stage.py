"""The stage `preference`: a model learns which of two answers is preferred, or which answers are good."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_value
from bessemer.core.progress import Progress, Silent
from bessemer.core.seeds import derive_seed
from bessemer.core.stage import OpenTasks
from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.posttraining.chat_models.files import place_fingerprint
from bessemer.posttraining.packing import PackedBatches, validation_on
from bessemer.posttraining.preference.config import PreferenceConfig
from bessemer.posttraining.preference.data import labelled_data, paired_data
from bessemer.posttraining.preference.reference import cached
from bessemer.posttraining.preference.registry import KTO
from bessemer.training.autotune import Plan, prepare_run
from bessemer.training.data.batches import BatchSource
from bessemer.training.run import OnStepEnd, run_training
from bessemer.training.starting_model import open_beside, starting_model
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
