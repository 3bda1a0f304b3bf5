"""Reports of the stages `revise` and `ai_preferences`: rates before and after, and rows to read."""

from __future__ import annotations

from pathlib import Path

from bessemer.core.figures import percent
from bessemer.core.records import read_records
from bessemer.core.report import Column, Facts, Folded, Metrics, Part, Section, StageReport, Table, Text

#: Rows that are shown, and characters of a text in a table.
_SHOWN, _LONGEST = 8, 400
#: What detectors tell, as `revise` names it, in words.
_DETECTED = {"hazard": "Hazards, by their words", "refusal": "Refusals, by phrases"}


def revise_report(stage: StageReport) -> Section:
    """What detectors find before and after, and revisions to read."""
    metrics = stage.metrics
    rows = [
        [
            title,
            percent(metrics[f"{name}_before_share"]),
            percent(metrics[f"{name}_after_share"]),
            f"{100 * metrics[f'{name}_difference_low']:+.1f} to {100 * metrics[f'{name}_difference_high']:+.1f}",
        ]
        for name, title in _DETECTED.items()
        if f"{name}_before_share" in metrics
    ]
    columns = [
        Column("Detector"),
        Column("Answers", True),
        Column("Revisions", True),
        Column("Difference, points (95 %)", True),
    ]
    parts: list[Part] = [
        Text(
            "The model answers, a critic says what is wrong with the answer by a principle, and writes it anew. Detectors look "
            "for words: they find what is plain, and a revision that says less harm in other words escapes them.",
            lead=True,
        ),
        Table(columns, rows),
        Facts({name: metrics[name] for name in ("prompts", "revisions", "dropped", "changed_share") if name in metrics}),
        *_table(stage.folder / "revisions.jsonl", {"Answer": "answer", "Critique": "critiques", "Revision": "completion"}),
    ]
    return Section(stage.titled("Revisions by principles"), parts)


def preferences_report(stage: StageReport) -> Section:
    """How sure the critic is, its bias, and pairs to read."""
    parts: list[Part] = [
        Text(
            "A critic compares two answers by a principle, in both orders. The confidence of a pair is the probability of the "
            "answer that it prefers; the place bias is by how much it prefers what is shown first, whatever that is.",
            lead=True,
        ),
        Facts(stage.metrics),
        *_table(stage.folder / "preferences.jsonl", {"Chosen": "chosen", "Rejected": "rejected", "Confidence": "confidence"}),
    ]
    return Section(stage.titled("Preferences of a model"), parts)


def revise_line(metrics: Metrics) -> str:
    """How many revisions, and the share of hazards before and after."""
    if "revisions" not in metrics:
        return ""
    before, after = (percent(metrics[f"hazard_{when}_share"]) for when in ("before", "after"))
    return f"{metrics['revisions']:,} revisions, hazards {before} → {after}"


def preferences_line(metrics: Metrics) -> str:
    """How many pairs, and how sure the critic is of them."""
    return f"{metrics['pairs']:,} pairs, mean confidence {metrics['mean_confidence']:.2f}" if "pairs" in metrics else ""


def _table(path: Path, shown: Metrics) -> list[Part]:
    """The first rows of a file, with their prompts and principles."""
    if not path.exists():
        return []
    records = [record.values for record in read_records(path)[:_SHOWN]]
    columns = [Column("Prompt"), Column("Principle"), *(Column(title) for title in shown)]
    rows = [
        [
            _cut(record["prompt"][-1].get("content") or ""),
            ", ".join(record["principles"]),
            *(_cut(_text(record[name])) for name in shown.values()),
        ]
        for record in records
    ]
    return [Folded(f"The first {len(rows)}", [Table(columns, rows)])]


def _text(value: object) -> str:
    if isinstance(value, list):
        return "\n\n".join(map(str, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
