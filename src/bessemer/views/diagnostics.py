"""Training diagnostics in the report: losses by source, norms and outliers by layer, memory, utilisation of the peak."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from bessemer.views.charts import Series, line_chart
from bessemer.views.heat import heat_map
from bessemer.views.tables import Column, soft, table

#: Most steps with diagnostics in a map, and most sources in a chart; more sources are shown as a table.
_COLUMNS, _CURVES = 24, 4

Records = Sequence[Mapping[str, Any]]


def diagnostics(records: Records, *, name: str) -> Markup:
    """The section's diagnostics, from the lines of a `metrics.jsonl`; empty when there are none.

    name: unique in the page, it begins the ids of the charts.
    """
    diagnosed = [record for record in records if any("/" in key for key in record)]
    charts = Markup("").join(
        [
            line_chart(
                [_series(records, "mfu", 100)], name=f"{name}-mfu", title="Share of the peak (MFU), %",
                wide=False, from_zero=True, averaged=True,
            ),
            line_chart(
                [_series(records, "peak_memory_bytes", 1e-9)], name=f"{name}-memory", title="Most memory so far, GB",
                wide=False, from_zero=True,
            ),
        ]
    )  # fmt: skip
    parts = [losses_by_source(diagnosed, name=f"{name}-sources"), charts]
    maps = [
        layers_map(diagnosed, "gradient_norm", title="Norm of the gradient, before clipping", shown=_figures),
        layers_map(diagnosed, "update_ratio", title="Update over weights, ‖Δw‖ / ‖w‖", shown=_figures, weights="weight_norm"),
        layers_map(diagnosed, "activation_outlier", title="Largest activation over the root mean square", shown=_figures),
    ]
    if any(maps):
        note = "Rows are places in the model, columns are steps; the darker, the larger, by the logarithm. Point at a cell."
        parts.append(soft(note) + Markup('<div class="heats">{}</div>').format(Markup("").join(maps)))
    body = Markup("").join(parts)
    return Markup("<h3>Diagnostics</h3>") + body if body else Markup("")


def losses_by_source(diagnosed: Records, *, name: str) -> Markup:
    """The loss of each source as curves; of more than a few, the first and the last as a table. Empty with fewer than two."""
    sources = list(dict.fromkeys(key for record in diagnosed for key in record if key.startswith("loss/")))
    series = [_series(diagnosed, source, label=source.removeprefix("loss/")) for source in sources]
    if len(series) < 2:
        return Markup("")
    if len(series) <= _CURVES:
        return line_chart(series, name=name, title="Loss by source, nats per token")
    rows = [(one.label, f"{_finite(one)[0]:.3f}", f"{_finite(one)[-1]:.3f}") for one in series if _finite(one)]
    columns = [Column("Source"), Column("Loss at first, nats per token", True), Column("at last", True)]
    return Markup("<h4>Loss by source</h4>") + table(columns, rows)


def layers_map(
    diagnosed: Records, kind: str, *, title: str, shown: Callable[[float], str], weights: str | None = None
) -> Markup:
    """A kind of figure as a map of places (down) and steps (across). The roles of a layer are one row: the root of the sum of
    their squares; of ratios, that of what they are ratios of, over the norm of it all (`weights`)."""
    steps = [record for record in diagnosed if any(key.startswith(f"{kind}/") for key in record)]
    if len(steps) > _COLUMNS:
        steps = [steps[round(index * (len(steps) - 1) / (_COLUMNS - 1))] for index in range(_COLUMNS)]
    rows = _rows(steps, kind)
    if not rows:
        return Markup("")
    values_RS = np.array([[_joined(record, kind, keys, weights) for record in steps] for keys in rows.values()])
    return heat_map(
        values_RS,
        title=title,
        shown=shown,
        rows="place",
        columns="step",
        shades_LH=_shades(values_RS),
        row_names=list(rows),
        column_names=[f"{record['step']}" for record in steps],
    )


def _rows(steps: Records, kind: str) -> dict[str, list[str]]:
    """The keys behind each row by its name, in the model's order: what is before the layers, these, and what is behind."""
    rows: dict[str, list[str]] = {}
    for record in steps:
        for key in record:
            place, found = key.removeprefix(f"{kind}/"), key.startswith(f"{kind}/")
            if found:
                layer = re.match(r"(layers|mtp)\.(\d+)", place)
                row = f"{'layer' if layer[1] == 'layers' else layer[1]} {layer[2]}" if layer else place.replace("_", " ")
                if key not in rows.setdefault(row, []):
                    rows[row].append(key)
    return rows


def _joined(record: Mapping[str, Any], kind: str, keys: Sequence[str], weights: str | None) -> float:
    known = {key: float(record[key]) for key in keys if isinstance(record.get(key), (int, float))}
    if not known:
        return math.nan
    if weights is None:
        return math.hypot(*known.values())
    norms = {key: float(record.get(f"{weights}/{key.removeprefix(f'{kind}/')}", math.nan)) for key in known}
    return math.hypot(*(ratio * norms[key] for key, ratio in known.items())) / (math.hypot(*norms.values()) or math.nan)


def _shades(values_RS: np.ndarray) -> np.ndarray:
    """0.08 for the smallest number, 1 for the largest, by their logarithms; what is no positive number has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.log(values_RS)
    finite = np.isfinite(logarithms)
    if not finite.any():
        return np.zeros_like(values_RS)
    low, high = logarithms[finite].min(), logarithms[finite].max()
    return np.where(finite, 0.08 + 0.92 * (logarithms - low) / max(high - low, 1e-9), 0.0)


def _series(records: Records, key: str, factor: float = 1.0, label: str = "") -> Series:
    found = [record for record in records if isinstance(record.get(key), (int, float))]
    return Series(label or key, [record["step"] for record in found], [record[key] * factor for record in found])


def _finite(series: Series) -> list[float]:
    return series.points()[1]


def _figures(value: float) -> str:
    return f"{value:.3g}"
