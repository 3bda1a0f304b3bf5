"""The stage `honesty`, with its section of the report."""

from __future__ import annotations

from typing import Any

from bessemer.core.records import read_records
from bessemer.core.report import Column, Facts, Metrics, Part, Section, StageReport, Table, Text
from bessemer.core.stage import StageContext, StageSpec
from bessemer.data.corpus.at_hand import documents_of
from bessemer.posttraining.honesty.config import HONESTY_VERSION, HonestyConfig

_SHOWN = 8


def _honesty(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.honesty.pairs import honesty

    documents = documents_of(context)
    assert documents is not None, "it is needed"
    return honesty(context.config, documents, context.out, seed=context.seed)


def _report(stage: StageReport) -> Section:
    parts: list[Part] = [
        Text(
            "Questions that the corpus answers, and questions for functions that a package does not have. Where no document "
            "answers, \"I don't know\" is preferred to the answer of another package's function; where one does, the answer.",
            lead=True,
        ),
        Facts(stage.metrics),
    ]
    path = stage.folder / "honesty.jsonl"
    if path.exists():
        rows = [
            [row["prompt"][0]["content"], row["chosen"], row["rejected"]]
            for row in (record.values for record in read_records(path)[:_SHOWN])
        ]
        parts.append(Table([Column("Question"), Column("Preferred"), Column("Rejected")], rows))
    return Section(stage.titled("Honesty"), parts)


def _summary_line(metrics: Metrics) -> str:
    return f"{metrics['known']:,} questions answered, {metrics['unknown']:,} not" if "known" in metrics else ""


STAGES = (
    StageSpec(
        kind="honesty",
        summary='Make pairs that prefer "I don\'t know" where the corpus holds no answer.',
        config=HonestyConfig,
        version=HONESTY_VERSION,
        needs={"documents": "documents"},
        makes={"honesty": "honesty.jsonl"},
        example="honesty: {pairs: 400}",
        uses_seed=True,
        report=_report,
        summary_line=_summary_line,
        run=_honesty,
        packages=lambda config: ["pyarrow"],
    ),
)
