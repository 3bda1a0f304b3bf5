"""One attention head as a picture file: its matrix of weights, and the weights of one query."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from bessemer.core.errors import ConfigError
from bessemer.core.store import new_file
from bessemer.inspection.inspect import Inspection
from bessemer.views.charts import STYLE
from bessemer.views.elements import POSITIVE, WEIGHT_EXPONENT, visible

_SUFFIXES = (".png", ".svg", ".pdf")
_COLOUR, _SOFT = "#{:02x}{:02x}{:02x}".format(*POSITIVE), "#6d6960"
#: Dots per inch, and the most tokens whose names have room.
_RESOLUTION, _NAMED = 110, 60


def check_suffix(path: Path) -> None:
    """Raise ConfigError for a file whose suffix is not that of a picture."""
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path}: a picture ends in one of {', '.join(_SUFFIXES)}")


def save_head_picture(inspection: Inspection, path: Path) -> None:
    """Draw the opened head to a file. Raises ConfigError when there is none."""
    if inspection.opened is None:
        raise ConfigError("there is no head to draw: every layer of this model is linear attention")
    opened, names = inspection.opened, [visible(piece) for piece in inspection.tokens.pieces]
    weights_TT = inspection.attention[opened.layer]
    assert weights_TT is not None
    colours = LinearSegmentedColormap.from_list("heat", ["#ffffff", _COLOUR])
    with matplotlib.rc_context(STYLE | {"font.size": 8.0}):
        figure = Figure(figsize=(8.2, 4.1), layout="constrained")
        matrix, bars = figure.subplots(1, 2, width_ratios=(1.25, 1))
        matrix.imshow(weights_TT[opened.head] ** WEIGHT_EXPONENT, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        matrix.set_title(f"Layer {opened.layer}, head {opened.head}", loc="left", weight="bold", fontsize=9)
        matrix.xaxis.tick_top()
        named = range(len(names)) if len(names) <= _NAMED else range(0, len(names), 10)
        sides = [names[place] if len(names) <= _NAMED else f"{place}" for place in named]
        matrix.set_xticks(named, sides, rotation=60, ha="left")
        matrix.set_yticks(named, sides)
        matrix.tick_params(length=0, rotation_mode="anchor")
        best = np.sort(np.argsort(-opened.weights_T, kind="stable")[:16])
        best = best[best <= opened.position]
        bars.barh(range(len(best)), opened.weights_T[best], color=_COLOUR, height=0.7)
        bars.set_title(f"Where {names[opened.position]} looks", loc="left", weight="bold", fontsize=9)
        bars.set_yticks(range(len(best)), [names[place] for place in best])
        bars.invert_yaxis()
        bars.set_xlim(0, 1)
        bars.set_xlabel("weight", color=_SOFT, loc="right")
        bars.tick_params(length=0)
        for axes in (matrix, bars):
            axes.spines[:].set_visible(False)
        # without dates the same picture has the same bytes
        dated = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        with new_file(path) as unfinished:
            figure.savefig(unfinished, format=path.suffix[1:], dpi=_RESOLUTION, metadata=dated[path.suffix])
