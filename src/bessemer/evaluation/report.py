"""Report of the evaluate and quantize stages: bits per byte beside baselines, tasks, differences; before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bessemer.core.metrics import LOSSY_NOTE, baseline_label, is_lossy, label, shown, size
from bessemer.core.report import Cell, Column, Heading, KeyFigure, Metrics, Part, Section, StageReport, Table, Text
from bessemer.core.store import read_json

_QUALITY_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("bytes", "Size", size),
    ("bits_per_byte", "Bits per byte", lambda value: f"{value:.4f}"),
    ("tokens_per_second", "Tokens per second, 8 answers at once", lambda value: f"{value:,.0f}"),
    ("cost_per_million_tokens", "Cost of a million tokens", lambda value: f"{value:.3g}"),
)


def report(stage: StageReport) -> Section | None:
    """The section of `results.json`: bits per byte, tasks, differences with their intervals."""
    results = stage.metrics
    parts: list[Part] = []
    if (models := models_table(results)) is not None:
        parts.append(models)
    if bits := bits_per_byte_table(results):
        parts += [bits, *breakdown_tables(results.get("bits_per_byte_by", {}))]
    if results.get("bits_per_byte") and is_lossy(stage.run.last_metrics("tokenize")):
        parts.append(Text(LOSSY_NOTE))
    for task, by_model in results.get("tasks", {}).items():
        parts += [Heading(label(task)), task_table(by_model)]
    if results.get("comparisons"):
        parts += [Heading("Differences"), comparisons_table(results["comparisons"])]
    return Section(stage.titled("Evaluation"), parts, headline=True) if parts else None


def summary_line(metrics: Metrics) -> str:
    """How many models were measured."""
    return f"{len(metrics['bits_per_byte'])} models measured" if "bits_per_byte" in metrics else ""


def sentences(stage: StageReport) -> list[str]:
    """Bits per byte beside the baselines, and what the last model of each task answered."""
    results = stage.metrics
    scores, baselines = results.get("bits_per_byte", {}), results.get("baselines", {})
    lines = []
    if scores:
        by_model = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
        baseline_scores = ", ".join(f"{baseline_label(name)} {score:.3f}" for name, score in baselines.items())
        lines.append(
            f"Bits per byte on text held out of training, lower is better: {by_model}"
            f"{f' (beside it: {baseline_scores})' if baseline_scores else ''}."
        )
        if is_lossy(stage.run.last_metrics("tokenize")):
            lines.append(LOSSY_NOTE)
    return lines + [_task_sentence(task, by_model) for task, by_model in results.get("tasks", {}).items() if by_model]


def _task_sentence(task: str, by_model: Mapping[str, Metrics]) -> str:
    name, scores = list(by_model.items())[-1]
    parts = [f"{scores['accuracy']:.0%} of {scores['n']:,} right"] if "accuracy" in scores else []
    if "exact_match_held_in" in scores:
        parts.append(f"{scores['exact_match_held_in']:.0%} of the questions it was tuned on answered exactly (memorised)")
    if "exact_match_held_out" in scores:
        parts.append(f"{scores['exact_match_held_out']:.0%} of new ones, ROUGE-L {scores['rouge_l_held_out']:.2f}")
    others = [metric for metric in scores if metric not in ("asked_as", "n")]
    if not parts and len(others) == 1:
        parts.append(f"{label(others[0])} {scores[others[0]]:.1%} of {scores['n']:,}")
    return f"{task} after {name}: {'; '.join(parts)}."


def key_figures(stage: StageReport) -> list[KeyFigure]:
    """The lowest bits per byte, and the share of its own questions that the last model answers exactly."""
    figures = []
    scores, baselines = stage.metrics.get("bits_per_byte", {}), stage.metrics.get("baselines", {})
    if scores:
        five = baselines.get("witten_bell_5gram")
        note = f"byte 5-gram {five:.3f}" if five else ""
        figures.append(KeyFigure(value=f"{min(scores.values()):.3f}", label="bits per byte, held out", note=note))
    for task, by_model in stage.metrics.get("tasks", {}).items():
        last = list(by_model.values())[-1] if by_model else {}
        if "exact_match_held_in" in last:
            share = f"{last['exact_match_held_in']:.0%}"
            figures.append(KeyFigure(value=share, label="of its own questions", note="memorised"))
        if "accuracy" in last:
            first = next(iter(by_model.values()))["accuracy"]
            figures.append(KeyFigure(value=f"{last['accuracy']:.0%}", label=f"of {label(task)}", note=f"at first {first:.0%}"))
    return figures


def models_table(results: Metrics) -> Table | None:
    """A row for each trained model in order: bits per byte, and task scores on questions that no training has seen.

    None where there are fewer than two models or no tasks.
    """
    tasks, bits = results.get("tasks", {}), results.get("bits_per_byte", {})
    names = list(dict.fromkeys([*bits, *(name for by_model in tasks.values() for name in by_model)]))
    if len(names) < 2 or not tasks:
        return None
    measured = {
        (task, metric): None
        for task, by_model in tasks.items()
        for values in by_model.values()
        for metric in values
        if metric not in ("asked_as", "n") and not metric.startswith("n_") and not metric.endswith("_held_in")
    }
    columns = [Column("Model after"), Column("Bits per byte, lower is better", True)]
    columns += [Column(f"{label(task)}: {label(metric)}", True) for task, metric in measured]
    rows: list[tuple[str | Cell, ...]] = [
        (
            Cell(name, strong=True),
            f"{bits[name]:.3f}" if name in bits else "–",
            *(shown(metric, tasks[task].get(name, {}).get(metric)) for task, metric in measured),
        )
        for name in names
    ]
    return Table(columns, rows)


def bits_per_byte_table(results: Metrics) -> Table | None:
    """Models and baselines, the best first; None when there are none."""
    models = {name: (value, True) for name, value in results.get("bits_per_byte", {}).items()}
    baselines = {baseline_label(name): (value, False) for name, value in results.get("baselines", {}).items()}
    ordered = sorted((models | baselines).items(), key=lambda item: item[1][0])
    if not ordered:
        return None
    worst = ordered[-1][1][0]
    rows = [
        (Cell(name, strong=True) if is_model else Cell(name, remark="baseline"), Cell(f"{value:.3f}", share=value / worst))
        for name, (value, is_model) in ordered
    ]
    return Table([Column("Held-out text"), Column("Bits per byte, lower is better", True)], rows)


def breakdown_tables(by: Mapping[str, Sequence[Metrics]]) -> list[Table]:
    """Bits per byte by source and domain, where there are several, and by position in a document; a column a model."""
    tables = []
    for kind, heading in (("source", "Source"), ("domain", "Domain"), ("position", "Tokens of the document before it")):
        rows = by.get(kind, ())
        if len(rows) < 2:
            continue
        worst = max(value for row in rows for value in row["bits_per_byte"].values())
        ends = [f"{row['first'] - 1:,}" for row in rows[1:]] if kind == "position" else []
        names = [row["name"] or "none" if "name" in row else f"{row['first']:,}" for row in rows]
        names = [f"{name} – {end}" for name, end in zip(names, ends, strict=False)] + names[len(ends) :]
        if ends:
            names[-1] = f"{names[-1]} and more"
        models = list(rows[0]["bits_per_byte"])
        columns = [Column(heading), Column("Text", True), *(Column(f"{model}, bits per byte", True) for model in models)]
        cells: list[list[str | Cell]] = [
            [name, size(row["bytes"]), *(Cell(f"{of:.3f}", share=of / worst) for of in row["bits_per_byte"].values())]
            for name, row in zip(names, rows, strict=True)
        ]
        tables.append(Table(columns, cells))
    return tables


def task_table(by_model: Mapping[str, Metrics]) -> Table:
    """A row a metric, a column a model. Held-in figures are named as memorised."""
    metrics = dict.fromkeys(metric for values in by_model.values() for metric in values)
    rows = [(label(metric), *(shown(metric, values.get(metric)) for values in by_model.values())) for metric in metrics]
    return Table([Column("Metric"), *(Column(model, True) for model in by_model)], rows)


def comparisons_table(comparisons: Sequence[Metrics]) -> Table:
    """Differences a − b with their bootstrap intervals, and whether the interval excludes 0."""
    rows = []
    for comparison in comparisons:
        low, high = comparison["interval"]
        verdict = "no clear difference" if low <= 0 <= high else "clear: the interval excludes 0"
        rows.append(
            (
                label(comparison["metric"]),
                f"{comparison['a']} − {comparison['b']}",
                f"{comparison['difference']:+.3f}",
                f"{low:+.3f} … {high:+.3f}",
                verdict,
            )
        )
    columns = [
        Column("Metric"),
        Column("Compared"),
        Column("Difference", True),
        Column("95 % interval", True),
        Column("Verdict"),
    ]
    return Table(columns, rows)


def quantisation_report(stage: StageReport) -> Section:
    """The section of `quality.json`, to which speed and cost may have been added since the stage ran."""
    quality = read_json(stage.folder / "model" / "quality.json", "report of a quantised model's quality")
    lead = "The same model with weights of fewer bits: what that saves, and what it costs in quality."
    parts: list[Part] = [Text(lead, lead=True), quality_table(quality), *map(Text, quality_sentences(quality))]
    return Section(stage.titled("Quantisation"), parts, headline=True)


def quantisation_summary_line(metrics: Metrics) -> str:
    """The scheme and the size of the quantised weights."""
    return f"{metrics['scheme']}, {size(metrics['quantised']['bytes'])} of weights"


def quality_table(quality: Metrics) -> Table:
    """A model before and after quantisation; a figure that was not taken has no column."""
    known = [column for column in _QUALITY_COLUMNS if any(column[0] in quality[name] for name in ("original", "quantised"))]
    named = {"original": "before", "quantised": f"after: {quality['scheme']}, {quality['method']}"}
    rows = [
        (model, *(show(quality[name][key]) if key in quality[name] else "–" for key, _, show in known))
        for name, model in named.items()
    ]
    return Table([Column("Model"), *(Column(heading, True) for _, heading, _ in known)], rows)


def quality_sentences(quality: Metrics) -> list[str]:
    """Loss, divergence and notes that the table does not hold."""
    lines = []
    if "kl_per_token" in quality:
        text = "tokens of a small text that comes with Bessemer" if "compared_on" in quality else "held-out tokens"
        lines.append(
            f"On {quality['compared_tokens']:,} {text}: {quality['loss']:+.2%} bits per byte, a divergence from the "
            f"original of {quality['kl_per_token']:.2g} nats a token, and the same likeliest token after "
            f"{quality['top_agreement']:.1%} of them."
        )
        before, after = (quality[name].get("arithmetic") for name in ("original", "quantised"))
        if before and after:
            lines.append(f"Measured as they are served here. Before: {before}. After: {after}.")
    return lines + [f"{note[0].upper()}{note[1:]}." for note in quality.get("notes", ())]
