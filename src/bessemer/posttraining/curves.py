"""Curves of the figures that a method of post-training logs, on its batches and on what is held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bessemer.core.report import Curves, Metrics, Series


def metric_curves(records: Sequence[Metrics], charts: Mapping[str, tuple[Sequence[str], float]]) -> list[Curves]:
    """A chart for each title, of the metrics that it names times a factor, as they are and as `validation_NAME`.

    records: the lines of a `metrics.jsonl`.
    """
    return [Curves(_series(records, keys, factor), title) for title, (keys, factor) in charts.items()]


def _series(records: Sequence[Metrics], keys: Sequence[str], factor: float) -> list[Series]:
    series = []
    for key in keys:
        for name, of in ((key, "training"), (f"validation_{key}", "held out")):
            points = [(record["step"], factor * record[name]) for record in records if name in record]
            if points:
                label = of if len(keys) == 1 else f"{key.rpartition('_')[2]}, {of}"
                series.append(Series(label, *zip(*points, strict=True)))
    return series
