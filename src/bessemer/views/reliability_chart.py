"""The reliability plot of an evaluation's choices, a whole SVG file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from bessemer.views.scaling_charts import LINES, SOFT, svg_chart


def reliability_chart(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy over confidence of each bin, a colour for each task, beside the diagonal where both are equal.

    tasks: results by name, with the `calibration` of `task_results`.
    """

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8)
        for number, (name, results) in enumerate(tasks.items()):
            found = results["calibration"]
            points = [(one["confidence"], one["accuracy"]) for one in found["bins"]]
            label = f"{name}: error {found['expected_calibration_error']:.3f}"
            axes.plot(*zip(*points, strict=True), "o-", color=LINES[number % len(LINES)], markersize=4, label=label)
        axes.legend(frameon=False, fontsize=7)

    return svg_chart(draw, "Reliability of choices", "confidence", "accuracy")
