"""Curves as SVG in the page's own colours, and charts as whole files: scaling laws, sweeps, an evaluation's reliability.

matplotlib knows no CSS variables: for a page it draws in stand-in colours, which are replaced in the text of the SVG, so that
one drawing serves light and dark. The same numbers give the same bytes. Ids begin with the chart's name, so that several
charts fit in one page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from bessemer.core.metrics import short_count
from bessemer.core.report import Curves
from bessemer.scaling.laws.fit import Fit
from bessemer.scaling.laws.isoflop import Parabola

_INK, _SOFT, _GRID = "#00000a", "#00000b", "#00000c"
_LINES = ("#00000d", "#00000e", "#00000f", "#000010")
#: Stand-in colour, and the page's own.
_COLOURS = {_INK: "var(--ink)", _SOFT: "var(--soft)", _GRID: "var(--line)"} | {
    colour: f"var(--curve-{index})" for index, colour in enumerate(_LINES, start=1)
}
#: The same numbers give the same bytes; a label is never read as mathematics.
STYLE: Any = {"svg.hashsalt": "bessemer", "text.parse_math": False}
#: Text stays text in an SVG, in the reader's own font.
TEXT_STYLE: Any = STYLE | {"svg.fonttype": "none", "font.family": ["sans-serif"]}
#: Curves with fewer points than this are not averaged.
_LONG = 60
#: Baselines nearer to each other than this share of the axis share a label.
_LABEL_DISTANCE = 0.06


def line_chart(curves: Curves, *, name: str) -> Markup:
    """Curves over a common x axis, and horizontal dashed lines for the baselines; a figure with a caption and SVG inside.

    name: unique in the page, it begins the SVG's ids. Returns an empty string when there is no point to draw.
    """
    drawn = [(curve.label, *curve.points()) for curve in curves.series]
    drawn = [curve for curve in drawn if curve[1]]
    if not drawn:
        return Markup("")
    with matplotlib.rc_context(TEXT_STYLE | {"font.size": 8.0}):
        figure = Figure(figsize=(7.4, 3.1) if curves.wide else (3.6, 2.1), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        _prepare(axes, curves.x_label)
        for (label, x, y), colour in zip(drawn, _LINES, strict=False):
            _draw(axes, label if len(drawn) > 1 else "", x, y, colour, curves.averaged)
        if curves.from_zero:
            axes.set_ylim(bottom=0)
        _draw_baselines(axes, curves.baselines)
        drawn_svg = svg_text(figure)
    unit = curves.x_label
    ends = (f"{label}: {y[0]:.4g} at {unit} {x[0]:g}, {y[-1]:.4g} at {unit} {x[-1]:g}" for label, x, y in drawn)
    levels = (f"{label}: {value:.4g}" for label, value in curves.baselines.items())
    svg = _inline(drawn_svg, name, curves.title, "; ".join([*ends, *levels]))
    return Markup('<figure class="chart{}"><figcaption>{}</figcaption>{}</figure>').format(
        "" if curves.wide else " half", curves.title, Markup(svg)
    )


def svg_text(figure: Figure) -> str:
    """A figure as the text of an SVG file, without its date."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _prepare(axes: Axes, x_label: str) -> None:
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_SOFT)
    axes.spines["bottom"].set_linewidth(0.6)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, length=0, pad=4)
    axes.tick_params(axis="x", length=3, width=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value) if abs(value) >= 1000 else f"{value:g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(x_label, color=_SOFT, loc="right", labelpad=2)
    axes.margins(x=0.015, y=0.08)


def _draw(axes: Axes, label: str, x: list[float], y: list[float], colour: str, averaged: bool) -> None:
    marker = "o" if len(x) < 25 else None
    if averaged and len(x) > _LONG:
        axes.plot(x, y, color=colour, linewidth=0.5, alpha=0.35)
        y = _moving_average(y)
    axes.plot(x, y, color=colour, linewidth=1.6, marker=marker, markersize=3, solid_capstyle="round")
    if label:
        axes.annotate(
            label,
            (x[-1], y[-1]),
            xytext=(0, 6),
            textcoords="offset points",
            color=colour,
            ha="right",
            va="bottom",
            weight="bold",
        )


def _moving_average(values: list[float]) -> list[float]:
    """Centred mean over a fiftieth of the curve, narrower near its ends: in the steep beginning it does not lag behind."""
    sums = [0.0, *accumulate(values)]
    half = len(values) // 100 + 1
    averages = []
    for index in range(len(values)):
        first = index - min(half, index)
        end = min(2 * index - first + 1, len(values))
        averages.append((sums[end] - sums[first]) / (end - first))
    return averages


def _draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    levels = sorted(baselines.items(), key=lambda item: -item[1])
    for _, value in levels:
        axes.axhline(value, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    bottom, top = axes.get_ylim()
    groups: list[list[tuple[str, float]]] = []
    for label, value in levels:
        if groups and groups[-1][0][1] - value < _LABEL_DISTANCE * (top - bottom):
            groups[-1].append((label, value))
        else:
            groups.append([(label, value)])
    for group in groups:
        text = " · ".join(f"{label} {value:.2f}" for label, value in group)
        axes.annotate(
            text,
            (1, group[0][1]),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-2, 3),
            textcoords="offset points",
            color=_INK,
            ha="right",
            va="bottom",
        )


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """A whole SVG file as an element of a page: its colours and fonts the page's, its ids begun with the chart's name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg.replace("xlink:href", "href"))
    svg = re.sub(r"font: ((?:bold |\d+ )?[\d.]+px)[^;\"]*", r"font: \1 var(--sans)", svg)
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    opening = re.match(r"<svg[^>]*>", svg)
    assert opening is not None
    view = re.search(r'viewBox="[^"]+"', opening.group())
    assert view is not None
    head = (
        f'<svg {view.group()} xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    return head + svg[opening.end() :].strip()


_FILE_INK, _FILE_SOFT, _FILE_GRID = "#22262e", "#6b7280", "#dfe3e8"
_FILE_LINES = ("#d9622b", "#2f6f9f", "#4d8b4f", "#8a5aa8", "#b58900", "#5b6770")


def fit_chart(fits: Sequence[Fit]) -> str:
    """Predicted against measured loss, one colour for each fit, on the diagonal where they agree."""

    def draw(axes: Axes) -> None:
        ends = []
        for fit, colour in zip(fits, _FILE_LINES, strict=False):
            predicted = fit.law.predict(fit.points.parameters, fit.points.tokens)
            axes.plot(fit.points.loss, predicted, "o", color=colour, markersize=4, label=fit.method, alpha=0.8)
            ends += [float(fit.points.loss.min()), float(fit.points.loss.max())]
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=_FILE_SOFT, linewidth=0.8)
        axes.legend(frameon=False)

    return _svg_chart(draw, "Loss: predicted against measured", f"measured {fits[0].metric}", f"predicted {fits[0].metric}")


def isoflop_chart(parabolas: Sequence[Parabola], metric: str) -> str:
    """The points and the parabola of each compute budget, its lowest point marked."""

    def draw(axes: Axes) -> None:
        _logarithmic(axes, short_count)
        for index, parabola in enumerate(parabolas):
            colour = _FILE_LINES[index % len(_FILE_LINES)]
            sizes = parabola.points.parameters
            axes.plot(sizes, parabola.points.loss, "o", color=colour, markersize=4, label=f"{parabola.flops:.2g} FLOPs")
            curve = np.geomspace(sizes.min(), sizes.max(), 60)
            axes.plot(curve, [parabola.predict(float(size)) for size in curve], color=colour, linewidth=1.2)
            axes.plot([parabola.parameters], [parabola.loss], "x", color=_FILE_INK, markersize=6)
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
            colour = _FILE_LINES[index % len(_FILE_LINES)]
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
        axes.set_title(title, color=_FILE_INK, loc="left", fontsize=10)
        axes.set_xlabel(x_label, color=_FILE_SOFT)
        axes.set_ylabel(y_label, color=_FILE_SOFT)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(color=_FILE_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_FILE_SOFT)
        draw(axes)
        return svg_text(figure)


def reliability_chart(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy over confidence of each bin, a colour for each task, beside the diagonal where both are equal.

    tasks: results by name, with the `calibration` of `task_results`.
    """

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_FILE_SOFT, linewidth=0.8)
        for number, (name, results) in enumerate(tasks.items()):
            calibration = results["calibration"]
            points = [(bin["confidence"], bin["accuracy"]) for bin in calibration["bins"]]
            label = f"{name}: error {calibration['expected_calibration_error']:.3f}"
            axes.plot(*zip(*points, strict=True), "o-", color=_FILE_LINES[number % len(_FILE_LINES)], markersize=4, label=label)
        axes.legend(frameon=False, fontsize=7)

    return _svg_chart(draw, "Reliability of choices", "confidence", "accuracy")
