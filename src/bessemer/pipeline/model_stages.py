"""The stages that make, train, measure and shrink a model, each wired to the room that does it.

Heavy libraries are imported inside the functions: checking a recipe needs none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.config import Config, nearest
from bessemer.core.stage import Outside, StageContext, StageSpec
from bessemer.data.config import (
    CollectConfig,
    MixedConfig,
    Source,
    source_name,
)
from bessemer.data.sources.config import (
    FilesSource,
    HuggingFaceSource,
    PythonDocsSource,
    TablesSource,
    UserSource,
    WheelsSource,
)
from bessemer.evaluation.config import EVALUATE_VERSION, EvaluateConfig
from bessemer.model.config import MODEL_VERSION, ModelStageConfig
from bessemer.model.quantisation.config import QUANTIZE_VERSION, QuantizeConfig
from bessemer.pipeline.data_stages import documents_at, documents_of
from bessemer.pipeline.memory_advice import memory_advice
from bessemer.posttraining.config import DOCS_QUESTIONS, SFT_VERSION, SFTConfig
from bessemer.tokenization.config import TokenizeConfig
from bessemer.training.config import PRETRAIN_VERSION, LoopConfig, PretrainConfig, check_compiler


def _model(work: StageContext) -> dict[str, Any]:
    from bessemer.model.stage import build_model

    return build_model(
        work.config, work.inputs["tokenizer"], work.out, seed=work.seed, folder=work.folder, progress=work.progress
    )


def _model_fingerprint(config: ModelStageConfig, outside: Outside) -> Any:
    if config.init_from is None:
        return None
    from bessemer.model.existing import existing_fingerprint

    return existing_fingerprint(config, outside.folder)


def _another_tokenizer(config: ModelStageConfig, above: Mapping[str, Any], folder: Path) -> str | None:
    """An existing model beside an existing tokenizer that is not its own. One that is trained may come out as the model's."""
    tokenize = above.get("tokenize")
    if config.init_from is None or not isinstance(tokenize, TokenizeConfig) or tokenize.tokenizer is None:
        return None
    from bessemer.model.existing import check_tokenizer
    from bessemer.tokenization.existing import existing_tokenizer

    check_tokenizer(config, existing_tokenizer(tokenize.tokenizer, folder), folder)
    return None


def _rows_too_long(config: LoopConfig, above: Mapping[str, Any]) -> str | None:
    """The stages that train find it out themselves; a recipe should, before hours of work on the stages above."""
    model = above.get("model")
    if not isinstance(model, ModelStageConfig):
        return None
    if model.init_from is not None and "max_position_embeddings" not in model.given:
        return None  # it is the existing model's
    return _longer_rows(config, model.max_position_embeddings)


def _rows_too_long_for_existing(config: LoopConfig, above: Mapping[str, Any], folder: Path) -> str | None:
    """As `_rows_too_long`, where the model's context stands in a folder."""
    model = above.get("model")
    if not isinstance(model, ModelStageConfig) or model.init_from is None:
        return None
    from bessemer.model.existing import changed_config, existing_model
    from bessemer.model.folder import read_model_config

    existing = read_model_config(existing_model(model.init_from, folder))
    return _longer_rows(config, changed_config(model, existing).max_position_embeddings)


def _longer_rows(config: LoopConfig, limit: int) -> str | None:
    if config.context_length <= limit:
        return None
    return (
        f"context_length {config.context_length:,} exceeds model.max_position_embeddings {limit:,}; lower the one or raise the "
        "other"
    )


def _check_loop(config: LoopConfig) -> None:
    from bessemer.training.monitoring.trackers import check_trackers

    check_trackers(config.track)
    if config.compile is True:
        check_compiler()


def _loop_packages(config: LoopConfig) -> list[str]:
    return [*_MODEL_PACKAGES, *(["torchao"] if config.float8 or config.optimizer_bits == 8 else [])]


def _model_packages(config: Config) -> Sequence[str]:
    return _MODEL_PACKAGES


_MODEL_PACKAGES = ("torch", "safetensors", "tokenizers", "pyarrow")


def _pretrain_conflict(config: PretrainConfig, above: Mapping[str, Any]) -> str | None:
    tokenize, collect = above.get("tokenize"), above.get("collect")
    if isinstance(tokenize, TokenizeConfig) and config.fim_rate and not (tokenize.fim_tokens or tokenize.tokenizer):
        return "fim_rate needs control tokens that the tokenizer will lack: set tokenize.fim_tokens"
    if isinstance(collect, CollectConfig):
        names = [source_name(source) for source in collect.sources]
        unknown = next((name for name in config.fim_sources if name not in names), None)
        if unknown is not None:
            return f"fim_sources: no source is named {unknown!r}{nearest(unknown, names)}"
    annealed = next((name for name, stage in above.items() if isinstance(stage, MixedConfig) and stage.anneal), None)
    if annealed and config.anneal_fraction is None and config.schedule != "wsd":
        return (
            f"anneal_fraction: {annealed}.anneal is a second mixture, and schedule: {config.schedule} has no decay to read it "
            "in; say for which share of the steps it is, or 0"
        )
    return _rows_too_long(config, above)


_OTHER_DATA = "name a file of conversations in sft.data, or leave the stage out with sft: null"


def _sft_conflict_of_files(config: SFTConfig, above: Mapping[str, Any], folder: Path) -> str | None:
    """Questions are made of documents that say which function they document: not those of plain text or of web pages."""
    if (too_long := _rows_too_long_for_existing(config, above, folder)) is not None:
        return too_long
    collect = above.get("collect")
    if DOCS_QUESTIONS not in config.data or not isinstance(collect, CollectConfig):
        return None
    if any(_may_document_functions(source, folder) for source in collect.sources):
        return None
    return f"{_NO_QUESTIONS}, and no source gives it; add wheels or python_docs to collect, {_OTHER_DATA}"


_NO_QUESTIONS = f"{DOCS_QUESTIONS} is made from documentation of functions and classes"


def _documents_without_questions(config: SFTConfig, inputs: Mapping[str, Path], cache: Path) -> str | None:
    """As `_sft_conflict_of_files`, for what only the documents themselves tell."""
    if DOCS_QUESTIONS not in config.data or "documents" not in inputs:
        return None
    from bessemer.data.corpus.reader import TRAIN
    from bessemer.posttraining.questions import has_question

    if has_question(documents_at(inputs["documents"], cache), TRAIN):
        return None
    return f"{_NO_QUESTIONS}, and none is left to learn from; {_OTHER_DATA}"


def _may_document_functions(source: Source, folder: Path) -> bool:
    """Whether documents of a source can have `package` and `qualname` in their metadata; records may or may not."""
    if isinstance(source, FilesSource):
        from bessemer.data.sources.formats.files import may_hold_records

        return may_hold_records(source.paths, folder)
    return isinstance(source, (WheelsSource, PythonDocsSource, UserSource, TablesSource, HuggingFaceSource))


def _settle_pretrain(work: StageContext) -> tuple[Config, dict[str, Any]]:
    from bessemer.training.autotune import settle

    with memory_advice(work):
        return settle(work.config, work.inputs["model"], device=work.device, progress=work.progress, folder=work.folder)


def _pretrain(work: StageContext) -> dict[str, Any]:
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
            measured_tokens_per_second=(work.measured or {}).get("tokens_per_second"),
        )


def _pretrain_fingerprint(config: PretrainConfig, outside: Outside) -> Any:
    if config.init_from is None:
        return None
    from bessemer.training.checkpoint.load import checkpoint_fingerprint

    return checkpoint_fingerprint(config.init_from, outside.folder, config.steps)


def _card_flops(device_name: str) -> float | None:
    """What a GPU of this name promises in bfloat16, FLOP/s; None when it is unknown."""
    from bessemer.scaling.hardware import card_of_device

    card = card_of_device(device_name)
    return None if card is None else card.flops


def _continuations(model: Any, tokenizer_folder: Path, prompts: list[str]) -> list[str]:
    """What a model in training makes of a few prompts, greedily: shown in the report."""
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.sampler import SamplingParams
    from bessemer.tokenization.tokenizer import load_tokenizer

    engine = Engine(model, load_tokenizer(tokenizer_folder))
    return [completion.text for completion in engine.generate(prompts, SamplingParams(max_tokens=48, temperature=0.0))]


def _sft(work: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.sft import sft

    with memory_advice(work):
        return sft(
            work.config,
            work.inputs["model"],
            documents_of(work),
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


def _evaluate(work: StageContext) -> dict[str, Any]:
    from bessemer.evaluation.stage import evaluate

    models = {role.removeprefix("model:"): path for role, path in work.inputs.items() if role.startswith("model:")}
    documents = documents_of(work)
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


def _quantize(work: StageContext) -> dict[str, Any]:
    from bessemer.evaluation.quantisation import add_speed, quantise_folder
    from bessemer.inference.benchmark import tokens_per_second
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


#: In the order in which data flows.
MODEL_SPECS = (
    StageSpec(
        name="model",
        config=ModelStageConfig,
        version=MODEL_VERSION,
        needs={"tokenizer": "tokenizer"},
        makes={"model": "model"},
        run=_model,
        uses_seed=True,
        fingerprint=_model_fingerprint,
        conflict_of_files=_another_tokenizer,
        packages=_model_packages,
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
        conflict=_pretrain_conflict,
        conflict_of_files=_rows_too_long_for_existing,
        packages=_loop_packages,
        check=_check_loop,
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
        conflict_of_files=_sft_conflict_of_files,
        unusable=_documents_without_questions,
        packages=_loop_packages,
        check=_check_loop,
    ),
    StageSpec(
        name="evaluate",
        config=EvaluateConfig,
        version=EVALUATE_VERSION,
        needs={"tokens": "tokens", "documents": "documents", "conversations": "conversations?"},
        makes={"results": "."},
        run=_evaluate,
        uses_seed=True,
        packages=_model_packages,
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
        packages=_model_packages,
    ),
)
