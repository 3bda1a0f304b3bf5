"""The stage `pictures` for the pipeline, with its section of the report."""

from __future__ import annotations

from typing import Any

from bessemer.core.report import Column, Facts, Metrics, Part, Section, StageReport, Table, Text
from bessemer.core.stage import Outside, StageContext, StageSpec
from bessemer.posttraining.pictures.config import PICTURES_VERSION, PicturesConfig

_LEFT = "left out: "


def report(stage: StageReport) -> Section:
    """How many pictures were kept, and why others were not."""
    metrics = stage.metrics
    reasons = [[name.removeprefix(_LEFT), f"{count:,}"] for name, count in metrics.items() if name.startswith(_LEFT)]
    parts: list[Part] = [
        Text("Pictures of pages and documents, each with its caption or alternative text, as rows to learn from.", lead=True),
        Facts({name: value for name, value in metrics.items() if not name.startswith(_LEFT)}),
        Table([Column("Left out"), Column("Pictures", True)], reasons),
    ]
    return Section(stage.titled("Pictures with texts"), parts)


def summary_line(metrics: Metrics) -> str:
    """Pictures kept and left out."""
    left_out = sum(count for name, count in metrics.items() if name.startswith(_LEFT))
    return f"{metrics['pictures']:,} pictures kept, {left_out:,} left out" if "pictures" in metrics else ""


def _run(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.pictures.stage import collect_pictures

    return collect_pictures(context.config, context.folder, context.out, context.progress)


def _fingerprint(config: PicturesConfig, outside: Outside) -> Any:
    from bessemer.posttraining.pictures.sources import fingerprint

    return fingerprint(config.sources, outside.folder, outside.cache, outside.progress)


def _packages(config: PicturesConfig) -> list[str]:
    kinds = {source.source for source in config.sources}
    return ["PIL", *(["fastwarc"] if "warc" in kinds else []), *(["pypdfium2"] if "pdf" in kinds else [])]


STAGES = (
    StageSpec(
        kind="pictures",
        summary="Collect pictures of pages and PDFs with their captions and alt texts, as rows for `sft`.",
        config=PicturesConfig,
        version=PICTURES_VERSION,
        needs={},
        makes={"pictures": "pictures"},
        example="pictures: {sources: [{source: html, paths: [pages/]}]}",
        remedy="make again without the page",
        report=report,
        summary_line=summary_line,
        run=_run,
        fingerprint=_fingerprint,
        packages=_packages,
    ),
)
