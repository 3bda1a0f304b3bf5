"""The stage `model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.config import Config
from bessemer.core.stage import Outside, StageContext, StageSpec, last_of
from bessemer.model import report
from bessemer.model.config import MODEL_VERSION, ModelStageConfig
from bessemer.tokenization.config import TokenizeConfig

#: What a stage imports that reads or makes a model.
MODEL_PACKAGES = ("torch", "safetensors", "tokenizers", "pyarrow")


def model_packages(config: Config) -> Sequence[str]:
    """What a stage imports that reads or makes a model, whatever its settings."""
    return MODEL_PACKAGES


def _model(context: StageContext) -> dict[str, Any]:
    from bessemer.model.stage import build_model

    return build_model(
        context.config,
        context.inputs.get("tokenizer"),
        context.out,
        seed=context.seed,
        folder=context.folder,
        progress=context.progress,
    )


def _model_fingerprint(config: ModelStageConfig, outside: Outside) -> Any:
    if config.init_from is None:
        return None
    from bessemer.model.existing import existing_fingerprint

    return existing_fingerprint(config, outside.folder)


def _no_tokenizer(config: ModelStageConfig, above: Mapping[str, Any]) -> str | None:
    """A new model needs a tokenizer; an existing one brings its own."""
    if config.init_from is not None or above:
        return None
    return "needs tokenizer, and no stage above makes it; add tokenize: {vocab_size: 4096}, or start from a model: init_from"


def _another_tokenizer(config: ModelStageConfig, above: Mapping[str, Any], folder: Path) -> str | None:
    """An existing model beside a tokenizer that is not its own. One that is still to be trained may come out as the model's, as
    where a recipe goes on with what another has made."""
    tokenize = last_of(above, TokenizeConfig)
    if config.init_from is None or tokenize is None:
        return None
    from bessemer.model.existing import check_tokenizer, check_vocabulary
    from bessemer.tokenization.existing import existing_tokenizer

    if tokenize.tokenizer is None:
        check_vocabulary(config, tokenize.vocab_size, folder)
        return None
    check_tokenizer(config, existing_tokenizer(tokenize.tokenizer, folder), folder)
    return None


STAGES = (
    StageSpec(
        kind="model",
        summary="Make the model folder that is trained: random weights, or those of an existing model.",
        config=ModelStageConfig,
        version=MODEL_VERSION,
        needs={"tokenizer": "tokenizer?"},
        makes={"model": "model"},
        links={"model": "model"},
        example="model: {preset: qwen3-1m}",
        remedy="make again: it has the vocabulary of that tokenizer; it was trained on nothing",
        budget_seconds=4,
        report=report.report,
        summary_line=report.summary_line,
        sentences=report.sentences,
        key_figures=report.key_figures,
        next_steps=report.next_steps,
        run=_model,
        uses_seed=True,
        fingerprint=_model_fingerprint,
        conflict=_no_tokenizer,
        conflict_of_files=_another_tokenizer,
        packages=model_packages,
    ),
)
