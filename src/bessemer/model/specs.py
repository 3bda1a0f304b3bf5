"""The stage `model` as the pipeline sees it: settings, inputs, checks, and its section of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.config import Config
from bessemer.core.metrics import short_count
from bessemer.core.report import Cell, Column, Facts, KeyFigure, Metrics, Part, Section, StageReport, Table, Text
from bessemer.core.stage import Outside, StageContext, StageSpec, last_of
from bessemer.model.config import IMPORT_VERSION, MODEL_VERSION, ImportConfig, ModelStageConfig
from bessemer.model.merging.config import MERGE_VERSION, MergeConfig
from bessemer.model.vision.stage_config import VISION_VERSION, VisionStageConfig
from bessemer.tokenization.config import TokenizeConfig

#: A model below this many parameters learns the look of its texts and little of what they say.
_SMALL = 100_000_000


def report(stage: StageReport) -> Section:
    """The model's figures and parts."""
    parts: list[Part] = [
        Text("The network before it has seen any text: what its parts weigh and what a token costs.", lead=True),
        Facts(stage.metrics),
        layers_table(stage.metrics.get("layers", ())),
    ]
    return Section(stage.titled("Model"), parts)


def summary_line(metrics: Metrics) -> str:
    """The number of parameters."""
    return f"{metrics['parameters']:,} parameters"


def sentences(stage: StageReport) -> list[str]:
    """The model's size, what it was trained on, and for a small one what it cannot do."""
    parameters = stage.metrics["parameters"]
    is_alone = len(stage.run.of_kind("model")) == 1
    tokens = sum(one.metrics.get("tokens") or 0 for one in stage.run.of_kind("pretrain")) if is_alone else 0
    lines = [f"{stage.titled('Model')}: {parameters:,} parameters{f', trained on {tokens:,} tokens' if tokens else ''}."]
    if parameters < _SMALL:
        answers = " and answers the questions that it was tuned on" if stage.run.of_kind("sft") else ""
        lines.append(
            f"At this size it writes in the style of its corpus{answers}; it does not know facts, reason, or answer "
            f"{'anything else' if answers else 'questions'} reliably."
        )
    return lines


def key_figures(stage: StageReport) -> list[KeyFigure]:
    """The number of parameters."""
    return [
        KeyFigure(
            value=short_count(stage.metrics["parameters"]),
            label="parameters" if stage.name == stage.kind else f"parameters: {stage.name}",
        )
    ]


def next_steps(stage: StageReport) -> list[str]:
    """Serving the run's model; behind a small one, which knows little, a recipe whose model answers from documents."""
    if not (stage.run.folder / "model").exists():
        return []
    is_small = stage.metrics.get("parameters", _SMALL) < _SMALL
    return [f"bessemer serve {stage.run.name}", *(["bessemer run assistant-smollm2"] if is_small else [])]


def layers_table(layers: Sequence[Metrics]) -> Table:
    """A model's parts: `part`, `count`, `shapes`, `parameters`, as the model stage reports them."""
    total = sum(layer["parameters"] for layer in layers) or 1
    rows = [
        (
            layer["part"],
            f"{layer['count']:,}",
            ", ".join(" × ".join(map(str, shape)) for shape in layer["shapes"]),
            Cell(f"{layer['parameters']:,}", share=layer["parameters"] / total),
        )
        for layer in layers
    ]
    columns = [Column("Part"), Column("Count", True), Column("Shapes of each"), Column("Parameters", True)]
    return Table(columns, rows)


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
    from bessemer.model.stage import existing_fingerprint

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
    from bessemer.model.stage import check_tokenizer, check_vocabulary
    from bessemer.tokenization.existing import existing_tokenizer

    if tokenize.tokenizer is None:
        check_vocabulary(config, tokenize.vocab_size, folder)
        return None
    check_tokenizer(config, existing_tokenizer(tokenize.tokenizer, folder), folder)
    return None


def _import(context: StageContext) -> dict[str, Any]:
    from bessemer.model.stage import import_stage

    return import_stage(context.config, context.out, folder=context.folder, progress=context.progress)


def _import_fingerprint(config: ImportConfig, outside: Outside) -> Any:
    from bessemer.model.stage import import_fingerprint

    return import_fingerprint(config, outside.folder)


def import_report(stage: StageReport) -> Section:
    """The model's figures and parts."""
    parts: list[Part] = [
        Text("A model that others have trained: what its parts weigh and what a token costs.", lead=True),
        Facts(stage.metrics),
        layers_table(stage.metrics.get("layers", ())),
    ]
    return Section(stage.titled("Imported model"), parts)


def _merge(context: StageContext) -> dict[str, Any]:
    from bessemer.model.merging.models import merge_stage

    stages = {role.removeprefix("model:"): path for role, path in context.inputs.items()}
    return merge_stage(
        context.config, stages, context.folder, context.out / "model", seed=context.seed, progress=context.progress
    )


def _merge_fingerprint(config: MergeConfig, outside: Outside) -> Any:
    if not config.folders():
        return None
    from bessemer.model.merging.models import folders_fingerprint

    return folders_fingerprint(config, outside.folder)


def _vision(context: StageContext) -> dict[str, Any]:
    from bessemer.model.vision.assemble import build_vision_model

    return build_vision_model(
        context.config,
        context.inputs["model"],
        context.out,
        seed=context.seed,
        folder=context.folder,
        progress=context.progress,
    )


def _vision_fingerprint(config: VisionStageConfig, outside: Outside) -> Any:
    if config.encoder is None:
        return None
    from bessemer.model.vision.assemble import encoder_fingerprint

    return encoder_fingerprint(config, outside.folder)


def vision_report(stage: StageReport) -> Section:
    """What a language model got to see pictures with."""
    parts: list[Part] = [
        Text(
            "The language model gets an encoder of pictures and a projector, which brings what the encoder gives to the width "
            "of the decoder. Before they are trained, a picture says nothing to it.",
            lead=True,
        ),
        Facts(stage.metrics),
    ]
    return Section(stage.titled("Pictures"), parts)


def merge_report(stage: StageReport) -> Section:
    """How the merged model was made."""
    parts: list[Part] = [
        Text(
            "Weights of several models made one, without training: what each model is good at may stay, or may get lost; an "
            "evaluation beside the models that went in shows which.",
            lead=True,
        ),
        Facts(stage.metrics),
    ]
    return Section(stage.titled("Merge"), parts)


def vision_summary_line(metrics: Metrics) -> str:
    """The parameters of what is new."""
    return f"{metrics['encoder_parameters']:,} parameters in the encoder, {metrics['projector_parameters']:,} in the projector"


def merge_summary_line(metrics: Metrics) -> str:
    """The method and the models."""
    return str(metrics["merge"])


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
        report=report,
        summary_line=summary_line,
        sentences=sentences,
        key_figures=key_figures,
        next_steps=next_steps,
        run=_model,
        uses_seed=True,
        fingerprint=_model_fingerprint,
        conflict=_no_tokenizer,
        conflict_of_files=_another_tokenizer,
        packages=model_packages,
    ),
    StageSpec(
        kind="vision",
        summary="Give a language model an encoder of pictures and a projector.",
        config=VisionStageConfig,
        version=VISION_VERSION,
        needs={"model": "model"},
        makes={"model": "model"},
        links={"model": "model"},
        example="vision: {image_size: 32, patch_size: 8}",
        remedy="make again, from a model that was made again",
        budget_seconds=2,
        report=vision_report,
        summary_line=vision_summary_line,
        next_steps=next_steps,
        run=_vision,
        uses_seed=True,
        fingerprint=_vision_fingerprint,
        packages=model_packages,
    ),
    StageSpec(
        kind="import",
        summary="Read somebody's model, such as smollm2, a GGUF file or a folder.",
        config=ImportConfig,
        version=IMPORT_VERSION,
        needs={},
        makes={"model": "model"},
        links={"model": "model"},
        example="import: smollm2",
        remedy="nothing: it was trained elsewhere",
        report=import_report,
        summary_line=summary_line,
        next_steps=next_steps,
        run=_import,
        fingerprint=_import_fingerprint,
        packages=model_packages,
    ),
    StageSpec(
        kind="merge",
        summary="Merge the weights of several models into one, without training.",
        config=MergeConfig,
        version=MERGE_VERSION,
        needs={},
        makes={"model": "model"},
        links={"model": "model"},
        example="merge: {models: [sft, dpo]}",
        remedy="merge again, from models that were made again",
        report=merge_report,
        summary_line=merge_summary_line,
        next_steps=next_steps,
        run=_merge,
        uses_seed=True,
        fingerprint=_merge_fingerprint,
        packages=model_packages,
        models_named=lambda config: config.stages(),
    ),
)
