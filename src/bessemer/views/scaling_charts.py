"""Charts as whole SVG files: scaling laws, sweeps, and the reliability of an evaluation's choices.

The same numbers give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bessemer.core.metrics import short_count
from bessemer.scaling.laws.fit import Fit
from bessemer.scaling.laws.isoflop import Parabola
from bessemer.views.charts import TEXT_STYLE, svg_text

_INK, _SOFT, _GRID = "#22262e", "#6b7280", "#dfe3e8"
_LINES = ("#d9622b", "#2f6f9f", "#4d8b4f", "#8a5aa8", "#b58900", "#5b6770")


def fit_chart(fits: Sequence[Fit]) -> str:
    """Predicted against measured loss, one colour for each fit, on the diagonal where they agree."""

    def draw(axes: Axes) -> None:
        ends = []
        for fit, colour in zip(fits, _LINES, strict=False):
            predicted = fit.law.predict(fit.points.parameters, fit.points.tokens)
            axes.plot(fit.points.loss, predicted, "o", color=colour, markersize=4, label=fit.method, alpha=0.8)
            ends += [float(fit.points.loss.min()), float(fit.points.loss.max())]
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=_SOFT, linewidth=0.8)
        axes.legend(frameon=False)

    return _svg_chart(draw, "Loss: predicted against measured", f"measured {fits[0].metric}", f"predicted {fits[0].metric}")


def isoflop_chart(parabolas: Sequence[Parabola], metric: str) -> str:
    """The points and the parabola of each compute budget, its lowest point marked."""

    def draw(axes: Axes) -> None:
        _logarithmic(axes, short_count)
        for index, parabola in enumerate(parabolas):
            colour = _LINES[index % len(_LINES)]
            sizes = parabola.points.parameters
            axes.plot(sizes, parabola.points.loss, "o", color=colour, markersize=4, label=f"{parabola.flops:.2g} FLOPs")
            curve = np.geomspace(sizes.min(), sizes.max(), 60)
            axes.plot(curve, [parabola.predict(float(size)) for size in curve], color=colour, linewidth=1.2)
            axes.plot([parabola.parameters], [parabola.loss], "x", color=_INK, markersize=6)
        # outside the axes: there may be many budgets
        axes.figure.legend(frameon=False, loc="outside right upper", fontsize=7)

    return _svg_chart(draw, "IsoFLOP curves", "parameters", metric)


def sweep_chart(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, metric: str) -> str:
    """Loss over one setting of a sweep, a curve for each combination of the others; a logarithmic axis over a wide range."""

    def draw(axes: Axes) -> None:
        values = [x for xs, _ in curves.values() for x in xs]
        if min(values) > 0 and max(values) / min(values) > 5:
            _logarithmic(axes, lambda value: f"{value:g}")
        for index, (label, (x, y)) in enumerate(curves.items()):
            colour = _LINES[index % len(_LINES)]
            axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.2, label=label or None)
        if any(curves):
            axes.legend(frameon=False)

    return _svg_chart(draw, f"{metric} over {x_label}", x_label, metric)


def _logarithmic(axes: Axes, words: Callable[[float], str]) -> None:
    """A logarithmic x axis, its decades in plain words: the style draws no mathematics."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _svg_chart(draw: Callable[[Axes], None], title: str, x_label: str, y_label: str) -> str:
    """An SVG file of one plot. draw: puts the data on its axes."""
    with matplotlib.rc_context(TEXT_STYLE | {"font.size": 9.0}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, color=_INK, loc="left", fontsize=10)
        axes.set_xlabel(x_label, color=_SOFT)
        axes.set_ylabel(y_label, color=_SOFT)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_SOFT)
        draw(axes)
        return svg_text(figure)


def reliability_chart(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy over confidence of each bin, a colour for each task, beside the diagonal where both are equal.

    tasks: results by name, with the `calibration` of `task_results`.
    """

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=0.8)
        for number, (name, results) in enumerate(tasks.items()):
            calibration = results["calibration"]
            points = [(bin["confidence"], bin["accuracy"]) for bin in calibration["bins"]]
            label = f"{name}: error {calibration['expected_calibration_error']:.3f}"
            axes.plot(*zip(*points, strict=True), "o-", color=_LINES[number % len(_LINES)], markersize=4, label=label)
        axes.legend(frameon=False, fontsize=7)

    return _svg_chart(draw, "Reliability of choices", "confidence", "accuracy")
