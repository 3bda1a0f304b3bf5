"""What `results.json` says: bits per byte beside the baselines, tasks, differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bessemer.views.bars import measured
from bessemer.views.figures import baseline_label, label, shown
from bessemer.views.tables import Column, table


def bits_per_byte_table(results: Mapping[str, Any]) -> Markup:
    """Models and baselines, the best first."""
    models = {name: (value, True) for name, value in results.get("bits_per_byte", {}).items()}
    baselines = {baseline_label(name): (value, False) for name, value in results.get("baselines", {}).items()}
    ordered = sorted((models | baselines).items(), key=lambda item: item[1][0])
    if not ordered:
        return Markup("")
    worst = ordered[-1][1][0]
    rows = [
        (
            Markup("<b>{}</b>").format(name) if is_model else Markup('{} <span class="soft">baseline</span>').format(name),
            measured(value / worst, f"{value:.3f}"),
        )
        for name, (value, is_model) in ordered
    ]
    return table([Column("Held-out text"), Column("Bits per byte, lower is better", True)], rows)


def tasks_tables(results: Mapping[str, Any]) -> Markup:
    """One table for each task: a row a metric, a column a model. Held-in figures are named as memorised."""
    return Markup("").join(
        Markup("<h3>{}</h3>{}").format(label(task), _task_table(by_model))
        for task, by_model in results.get("tasks", {}).items()
    )


def _task_table(by_model: Mapping[str, Mapping[str, Any]]) -> Markup:
    metrics = dict.fromkeys(metric for values in by_model.values() for metric in values)
    rows = [(label(metric), *(shown(metric, values.get(metric)) for values in by_model.values())) for metric in metrics]
    return table([Column("Metric"), *(Column(model, True) for model in by_model)], rows)


def comparisons_table(comparisons: Sequence[Mapping[str, Any]]) -> Markup:
    """Differences a − b with their bootstrap intervals, and whether the interval excludes 0."""
    if not comparisons:
        return Markup("")
    rows = []
    for one in comparisons:
        low, high = one["interval"]
        verdict = "no clear difference" if low <= 0 <= high else "clear: the interval excludes 0"
        rows.append(
            (
                label(one["metric"]),
                f"{one['a']} − {one['b']}",
                f"{one['difference']:+.3f}",
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
    return table(columns, rows)
