"""The stages a recipe may name, in the order in which data flows, each wired to the room that does it.

Heavy libraries are imported inside the functions: checking a recipe needs none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.core.config import Config, nearest
from bessemer.data.config import (
    CLEAN_VERSION,
    COLLECT_VERSION,
    DEDUPLICATE_VERSION,
    EDITS,
    SELECT_VERSION,
    CleanConfig,
    CollectConfig,
    DeduplicateConfig,
    SelectConfig,
    source_name,
)
from bessemer.data.thresholds import scores_of
from bessemer.evaluation.config import EVALUATE_VERSION, EvaluateConfig
from bessemer.model.config import MODEL_VERSION, ModelStageConfig
from bessemer.model.quantisation.config import QUANTIZE_VERSION, QuantizeConfig
from bessemer.pipeline.graph import Outside, StageSpec, Work
from bessemer.pipeline.language_model import open_language_model
from bessemer.pipeline.memory_advice import memory_advice
from bessemer.posttraining.config import SFT_VERSION, SFTConfig
from bessemer.tokenization.config import TOKENIZE_VERSION, TokenizeConfig
from bessemer.training.config import PRETRAIN_VERSION, LoopConfig, PretrainConfig


def _collect(work: Work) -> dict[str, Any]:
    from bessemer.data.collect import collect
    from bessemer.data.forgotten import forgotten_ids

    # work.out is STORE/KEY.partial
    forgotten = forgotten_ids(work.out.parent)
    return collect(work.config, work.out, cache=work.cache, folder=work.folder, progress=work.progress, forgotten=forgotten)


def _collect_fingerprint(config: CollectConfig, outside: Outside) -> Any:
    from bessemer.data.opening import source_fingerprint

    return [
        source_fingerprint(source, cache=outside.cache, folder=outside.folder, fetch=outside.fetch, progress=outside.progress)
        for source in config.sources
    ]


def _clean(work: Work) -> dict[str, Any]:
    from bessemer.data.clean import clean

    return clean(
        work.config,
        work.inputs["documents"],
        work.out,
        folder=work.folder,
        progress=work.progress,
        open_model=partial(open_language_model, device=work.device),
    )


def _deduplicate(work: Work) -> dict[str, Any]:
    from bessemer.data.deduplicate import deduplicate

    return deduplicate(work.config, work.inputs["documents"], work.out, folder=work.folder, progress=work.progress)


def _select(work: Work) -> dict[str, Any]:
    from bessemer.data.select import select

    return select(work.config, work.inputs["documents"], work.out, folder=work.folder, progress=work.progress)


def _documents(work: Work) -> Path | None:
    """The documents that feed a stage, as files: those on object storage are copied into the cache. None where it has none."""
    from bessemer.data.stored import copies_of, documents_at_hand

    if (folder := work.inputs.get("documents")) is None:
        return None
    return documents_at_hand(folder, copies_of(work.cache, folder.parent.name))


def _lists_and_models(config: CleanConfig, outside: Outside) -> Any:
    if not (config.word_lists or config.url_lists or config.classifiers or config.perplexity):
        return None
    from bessemer.data.registry import outside_of

    return outside_of(config, outside.folder)


def _earlier_corpus(config: DeduplicateConfig, outside: Outside) -> Any:
    if config.against is None:
        return None
    from bessemer.data.deduplicate import earlier_fingerprint

    return earlier_fingerprint(config, outside.folder)


def _missing_score(config: SelectConfig, above: Mapping[str, Any]) -> str | None:
    """A preset whose scores the recipe does not compute, found before hours of work on the corpus."""
    clean = above.get("clean")
    if not isinstance(clean, CleanConfig):
        return None
    wanted = [(f"keep: {name}", score) for name in config.keep for score in scores_of(name)]
    wanted += [("languages", "language")] if config.language_limits() else []
    return next(
        (
            f"{setting} needs the {kind} {score}; add it to clean.{kind}"
            for setting, score in wanted
            for kind in ("edit" if score in EDITS else "score",)
            if score not in (clean.edit if kind == "edit" else clean.score)
        ),
        None,
    )


def _evaluation_sets(config: SelectConfig, outside: Outside) -> Any:
    if not config.decontaminate:
        return None
    from bessemer.core.hashing import hash_file
    from bessemer.data.select import evaluation_files

    return [[path.name, hash_file(path)] for path in evaluation_files(config, outside.folder)]


def _tokenize(work: Work) -> dict[str, Any]:
    from bessemer.tokenization.stage import tokenize

    documents = _documents(work)
    assert documents is not None
    return tokenize(work.config, documents, work.out, seed=work.seed, progress=work.progress, folder=work.folder)


def _tokenize_fingerprint(config: TokenizeConfig, outside: Outside) -> Any:
    if config.tokenizer is None:
        return None
    from bessemer.tokenization.existing import existing_fingerprint

    return existing_fingerprint(config.tokenizer, outside.folder)


def _unknown_source(config: TokenizeConfig, above: Mapping[str, Any]) -> str | None:
    """A weight of a source that the recipe does not collect, found before hours of work on the corpus."""
    collect = above.get("collect")
    names = [source_name(source) for source in collect.sources] if isinstance(collect, CollectConfig) else []
    unknown = next((source for source in config.source_weights if names and source not in names), None)
    return None if unknown is None else f"source_weights: no source is named {unknown!r}{nearest(unknown, names)}"


def _model(work: Work) -> dict[str, Any]:
    from bessemer.model.stage import build_model

    return build_model(
        work.config, work.inputs["tokenizer"], work.out, seed=work.seed, folder=work.folder, progress=work.progress
    )


def _model_fingerprint(config: ModelStageConfig, outside: Outside) -> Any:
    if config.init_from is None:
        return None
    from bessemer.model.existing import existing_fingerprint

    return existing_fingerprint(config, outside.folder)


def _rows_too_long(config: LoopConfig, above: Mapping[str, Any]) -> str | None:
    """The stages that train find it out themselves; a recipe should, before hours of work on the stages above."""
    model = above.get("model")
    if not isinstance(model, ModelStageConfig) or config.context_length <= model.max_position_embeddings:
        return None
    if model.init_from is not None and "max_position_embeddings" not in model.given:
        return None  # it is the existing model's
    return (
        f"context_length {config.context_length:,} exceeds model.max_position_embeddings "
        f"{model.max_position_embeddings:,}; lower the one or raise the other"
    )


def _check_trackers(config: LoopConfig) -> None:
    from bessemer.training.tracking import check_trackers

    check_trackers(config.track)


def _settle_pretrain(work: Work) -> tuple[Config, dict[str, Any]]:
    from bessemer.training.startup import settle

    with memory_advice(work):
        return settle(work.config, work.inputs["model"], device=work.device, progress=work.progress, folder=work.folder)


def _pretrain(work: Work) -> dict[str, Any]:
    from bessemer.training.pretrain import pretrain

    with memory_advice(work):
        return pretrain(
            work.config,
            work.inputs["model"],
            work.inputs["tokens"],
            work.out,
            seed=work.seed,
            device=work.device,
            progress=work.progress,
            sample=_continuations,
            folder=work.folder,
            card_flops=_card_flops,
        )


def _pretrain_fingerprint(config: PretrainConfig, outside: Outside) -> Any:
    if config.init_from is None:
        return None
    from bessemer.training.origin import checkpoint_fingerprint

    return checkpoint_fingerprint(config.init_from, outside.folder)


def _card_flops(device_name: str) -> float | None:
    """What a GPU of this name promises in bfloat16, FLOP/s; None when it is unknown."""
    from bessemer.scaling.hardware import card_of_device

    card = card_of_device(device_name)
    return None if card is None else card.flops


def _continuations(model: Any, tokenizer_folder: Path, prompts: list[str]) -> list[str]:
    """What a model in training makes of a few prompts, greedily: shown in the report."""
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling import SamplingParams
    from bessemer.tokenization.tokenizer import load_tokenizer

    engine = Engine(model, load_tokenizer(tokenizer_folder))
    return [completion.text for completion in engine.generate(prompts, SamplingParams(max_tokens=48, temperature=0.0))]


def _sft(work: Work) -> dict[str, Any]:
    from bessemer.posttraining.sft import sft

    with memory_advice(work):
        return sft(
            work.config,
            work.inputs["model"],
            _documents(work),
            work.out,
            seed=work.seed,
            device=work.device,
            progress=work.progress,
            folder=work.folder,
            card_flops=_card_flops,
        )


def _sft_fingerprint(config: SFTConfig, outside: Outside) -> Any:
    from bessemer.posttraining.conversations import data_fingerprint

    return data_fingerprint(config, outside.folder)


def _evaluate(work: Work) -> dict[str, Any]:
    from bessemer.evaluation.stage import evaluate

    models = {role.removeprefix("model:"): path for role, path in work.inputs.items() if role.startswith("model:")}
    documents = _documents(work)
    assert documents is not None
    return evaluate(
        work.config,
        models,
        work.inputs["tokens"],
        documents,
        work.inputs.get("conversations"),
        work.out,
        seed=work.seed,
        device=work.device,
        progress=work.progress,
    )


def _quantize(work: Work) -> dict[str, Any]:
    from bessemer.evaluation.quantisation import add_speed, quantise_folder
    from bessemer.inference.speed import tokens_per_second
    from bessemer.tokenization.shards import TokenShards

    out = work.out / "model"
    found = quantise_folder(
        work.config,
        work.inputs["model"],
        out,
        calibration=TokenShards(work.inputs["tokens"] / "train"),
        held_out=TokenShards(work.inputs["tokens"] / "validation"),
        seed=work.seed,
        device=work.device,
        progress=work.progress,
    )
    if not work.config.speed_tokens:
        return found
    work.progress.say("  measuring how fast both models answer")
    models = {"original": work.inputs["model"], "quantised": out}
    return add_speed(out, {name: tokens_per_second(at, work.config.speed_tokens, work.device) for name, at in models.items()})


_SPECS = (
    StageSpec(
        name="collect",
        config=CollectConfig,
        version=COLLECT_VERSION,
        needs={},
        makes={"documents": "documents"},
        run=_collect,
        resumes=True,
        fingerprint=_collect_fingerprint,
    ),
    StageSpec(
        name="clean",
        config=CleanConfig,
        version=CLEAN_VERSION,
        needs={"documents": "documents"},
        makes={"documents": "documents"},
        run=_clean,
        resumes=True,
        fingerprint=_lists_and_models,
    ),
    StageSpec(
        name="deduplicate",
        config=DeduplicateConfig,
        version=DEDUPLICATE_VERSION,
        needs={"documents": "documents"},
        makes={"documents": "documents"},
        run=_deduplicate,
        resumes=True,
        fingerprint=_earlier_corpus,
    ),
    StageSpec(
        name="select",
        config=SelectConfig,
        version=SELECT_VERSION,
        needs={"documents": "documents"},
        makes={"documents": "documents"},
        run=_select,
        resumes=True,
        fingerprint=_evaluation_sets,
        conflict=_missing_score,
    ),
    StageSpec(
        name="tokenize",
        config=TokenizeConfig,
        version=TOKENIZE_VERSION,
        needs={"documents": "documents"},
        makes={"tokenizer": "tokenizer", "tokens": "tokens"},
        run=_tokenize,
        uses_seed=True,
        resumes=True,
        fingerprint=_tokenize_fingerprint,
        conflict=_unknown_source,
    ),
    StageSpec(
        name="model",
        config=ModelStageConfig,
        version=MODEL_VERSION,
        needs={"tokenizer": "tokenizer"},
        makes={"model": "model"},
        run=_model,
        uses_seed=True,
        fingerprint=_model_fingerprint,
    ),
    StageSpec(
        name="pretrain",
        config=PretrainConfig,
        version=PRETRAIN_VERSION,
        needs={"model": "model", "tokens": "tokens"},
        makes={"model": "model"},
        run=_pretrain,
        uses_seed=True,
        resumes=True,
        trains=True,
        settle=_settle_pretrain,
        fingerprint=_pretrain_fingerprint,
        conflict=_rows_too_long,
        check=_check_trackers,
    ),
    StageSpec(
        name="sft",
        config=SFTConfig,
        version=SFT_VERSION,
        needs={"model": "model", "documents": "documents?"},
        makes={"model": "model", "conversations": "conversations"},
        run=_sft,
        uses_seed=True,
        resumes=True,
        trains=True,
        fingerprint=_sft_fingerprint,
        conflict=_rows_too_long,
        check=_check_trackers,
    ),
    StageSpec(
        name="evaluate",
        config=EvaluateConfig,
        version=EVALUATE_VERSION,
        needs={"tokens": "tokens", "documents": "documents", "conversations": "conversations?"},
        makes={"results": "."},
        run=_evaluate,
        uses_seed=True,
        models_named=lambda config: list(config.models),
    ),
    StageSpec(
        name="quantize",
        config=QuantizeConfig,
        version=QUANTIZE_VERSION,
        needs={"model": "model", "tokens": "tokens"},
        makes={"quantised": "model"},
        run=_quantize,
        uses_seed=True,
    ),
)

#: Every stage by its key in a recipe.
STAGES: dict[str, StageSpec] = {spec.name: spec for spec in _SPECS}

#: The stages that make documents: those of the funnel.
DATA_STAGES = tuple(spec.name for spec in _SPECS if "documents" in spec.makes)
