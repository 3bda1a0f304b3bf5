"""Report of the stage `synthesize`: what is left and why, and conversations to read."""

from __future__ import annotations

from bessemer.core.records import read_records
from bessemer.core.report import Column, Facts, Folded, Metrics, Part, Section, StageReport, Table, Text

#: Conversations that are shown, and characters of a text in the table.
_SHOWN, _LONGEST = 12, 500


def report(stage: StageReport) -> Section:
    """Counts, reasons for what was left out, the first conversations."""
    reasons = stage.metrics.get("reasons", {})
    parts: list[Part] = [
        Text(
            "A model writes conversations. The refinery leaves out copies among the prompts, and answers beyond the limits of "
            "its scores; each row of synthetic.jsonl says which model wrote it, from what, and with which settings.",
            lead=True,
        ),
        Facts(stage.metrics),
    ]
    if reasons:
        rows = [[reason, f"{count:,}"] for reason, count in reasons.items()]
        parts.append(Table([Column("Left out because"), Column("Conversations", True)], rows))
    path = stage.folder / "synthetic.jsonl"
    if path.exists():
        shown = [
            [_cut(record.values["prompt"][-1].get("content") or ""), _cut(record.values["completion"])]
            for record in read_records(path)[:_SHOWN]
        ]
        parts.append(Folded(f"The first {len(shown)}", [Table([Column("Prompt"), Column("Answer")], shown)]))
    return Section(stage.titled("Synthetic data"), parts)


def summary_line(metrics: Metrics) -> str:
    """Conversations that are left, of how many."""
    if "conversations" not in metrics:
        return ""
    return f"{metrics['conversations']:,} of {metrics['prompts']:,} conversations"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
