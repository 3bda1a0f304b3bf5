"""The stage `embedder`: a decoder learns to give texts vectors by which passages are found.

The result is a model's folder as any other, which `bessemer index --embedder FOLDER` opens: its vectors are the means of hidden
states that were trained here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from bessemer.core.errors import SourceError
from bessemer.core.hashing import derive_seed
from bessemer.posttraining.data.made import data_path
from bessemer.posttraining.data.packing import PackedBatches, validation_on
from bessemer.posttraining.data.splitting import split_examples
from bessemer.posttraining.embedding.config import EmbedderConfig
from bessemer.posttraining.embedding.data import QuestionRow, pack_questions, read_questions
from bessemer.posttraining.embedding.objective import ContrastiveObjective
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.autotune import RunCost
from bessemer.training.data.batch import Batch
from bessemer.training.job import RunContext, RunOptions, TrainingHooks, TrainingJob


def embedder(
    config: EmbedderConfig,
    model: Path,
    out: Path,
    *,
    made: Mapping[str, Path] | None = None,
    only_resolve: bool = False,
    **options: Unpack[RunOptions],
) -> dict[str, Any]:
    """Train the model of folder `model` on questions and their passages; resumes from `out`.

    Writes below `out`: `model/`, `metrics.jsonl`, `autotune.json` and `checkpoints/`. Files named in the settings are relative
    to `folder`. made: files of stages above, by their names in `data`. only_resolve: measure, and raise SettingsResolvedError
    with the settings.

    Returns the headline metrics. Raises SourceError and ArtefactError for questions that are missing or malformed, and what
    `TrainingJob` raises.
    """
    run = RunContext(out, **options)
    tokenizer = load_tokenizer(model)
    rows: list[QuestionRow] = []
    for name in config.data:
        place = data_path(name, run.folder, made or {})
        assert isinstance(place, Path)
        rows += read_questions(place, config.negatives)
    training, held_out = split_examples(rows, lambda row: row.question, config.validation_share, run.seed)
    packed = pack_questions(training, tokenizer, config.context_length, run.seed)
    validation = _held_out(held_out, tokenizer, config, run.seed)
    run.progress.say(f"  {packed.questions:,} questions in {packed.rows:,} rows, {packed.questions / packed.rows:.1f} in each")
    if config.steps is None:
        config = config.with_changes(steps=config.batch_sizes.steps_for(math.ceil(config.epochs * packed.rows)))
    cost = None if validation is None else RunCost(validation.tokens_BT.numel(), 0)
    job = TrainingJob.open(config, model, run, description="embedder", cost=cost, only_resolve=only_resolve)
    config = job.config
    hooks = TrainingHooks()
    if validation is not None:
        on_step_end = validation_on(validation, config)
        hooks = TrainingHooks(lambda decoder: on_step_end)
    summary = job.train(
        PackedBatches(packed.batch, batch_size=config.batch_size, seed=derive_seed(run.seed, "batches")),
        objective=ContrastiveObjective(config.temperature),
        hooks=hooks,
    )
    return {
        "questions": packed.questions,
        "held_out": len(held_out) if validation is not None else 0,
        "rows": packed.rows,
        **{name: value for name, value in summary.items() if name != "parameters"},
    }


def _held_out(rows: Sequence[QuestionRow], tokenizer: Tokenizer, config: EmbedderConfig, seed: int) -> Batch | None:
    """The held-out questions in rows; None where they are too few to be told apart."""
    try:
        return pack_questions(rows, tokenizer, config.context_length, seed).batch
    except SourceError:
        return None
