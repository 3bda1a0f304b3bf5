"""Histograms of scores, each with its thresholds: small drawings that take their colours from the page.

Heights are square roots of counts, so that the few documents beside a threshold are seen next to the many far from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from markupsafe import Markup

from bessemer.data.thresholds.apply import display_name
from bessemer.views.figures import percent

_WIDTH, _HEIGHT, _LABELS = 240.0, 64.0, 14.0
#: What lies beyond the axis is drawn as one block at its end, so wide, and so far from it.
_BLOCK, _GAP = 9.0, 5.0
_NARROWEST = 3.0


@dataclass(frozen=True)
class Bin:
    """A range of scores with its documents; wholly kept or wholly dropped by the score's own limits."""

    start: float
    end: float
    count: int
    kept: bool


@dataclass(frozen=True)
class Histogram:
    """How one score of a number of documents lies, those without one among them. `low` and `high` are the ends of its axis;
    bins may lie beyond them, the outermost without end."""

    column: str
    documents: int
    low: float
    high: float
    bins: Sequence[Bin]
    lowest: float | None = None
    highest: float | None = None
    #: Documents that break the limits, and those that break no others; None where it was not counted.
    outside: int | None = None
    alone: int | None = None

    @property
    def limit(self) -> str:
        """The limits in words: `at least 3, at most 10`."""
        words = [f"at least {figure(self.lowest)}"] if self.lowest is not None else []
        return ", ".join([*words, *([f"at most {figure(self.highest)}"] if self.highest is not None else [])])


def histograms(metrics: Mapping[str, Any]) -> list[Histogram]:
    """The scores of a data stage: those with a limit (`thresholds`) in their order, then the others (`scores`)."""
    limited = metrics.get("thresholds", {})
    others = {column: found for column, found in metrics.get("scores", {}).items() if column not in limited}
    return [*(_limited(column, found) for column, found in limited.items()), *(_free(*item) for item in others.items())]


def _limited(column: str, found: Mapping[str, Any]) -> Histogram:
    lowest, highest = found["lowest"], found["highest"]
    edges = [-math.inf, *found["edges"], math.inf]
    counts = [found["below"], *found["counts"], found["above"]]
    bins = [
        Bin(start, end, count, (lowest is None or start >= lowest) and (highest is None or start <= highest))
        for (start, end), count in zip(pairwise(edges), counts, strict=True)
    ]
    return Histogram(
        column, found["documents"], found["low"], found["high"], bins, lowest, highest, found["outside"], found["alone"]
    )


def _free(column: str, found: Mapping[str, Any]) -> Histogram:
    low, high, counts = found["low"], found["high"], found["counts"]
    edges = [low + (high - low) * place / len(counts) for place in range(len(counts) + 1)]
    edges = [-math.inf, *edges, math.inf]
    counts = [found.get("below", 0), *counts, found.get("above", 0)]
    return Histogram(
        column, sum(counts), low, high, [Bin(*ends, count, True) for ends, count in zip(pairwise(edges), counts, strict=True)]
    )


def drawings(found: Sequence[Histogram], *, name: str) -> Markup:
    """Histograms side by side; `name` begins their ids, which are unique in a page."""
    return Markup('<div class="histograms">{}</div>').format(
        Markup("").join(
            _figure(one, f"{name}-{re.sub(r'[^a-z0-9]+', '-', one.column.lower())}-{n}") for n, one in enumerate(found)
        )
    )


def _figure(one: Histogram, name: str) -> Markup:
    return Markup('<figure class="histogram"><figcaption>{} <span class="soft">{}</span></figcaption>{}</figure>').format(
        display_name(one.column), effect(one), _drawing(one, name)
    )


def effect(one: Histogram) -> str:
    """What the thresholds of a score do, in words; empty where it has none."""
    if not one.limit or one.outside is None:
        return one.limit
    if not one.outside:
        return f"{one.limit}: drops none"
    return f"{one.limit}: drops {one.outside:,} ({percent(one.outside / one.documents)}), {one.alone:,} for this alone"


@dataclass(frozen=True)
class _Layout:
    """Where everything is drawn: bars as (bin, x, width), the limits' x, and where the axis begins and ends."""

    bars: Sequence[tuple[Bin, float, float]]
    limits: Sequence[float]
    start: float
    end: float


def _layout(one: Histogram) -> _Layout:
    """Bars over an axis from `low` to `high`, and what lies beyond as blocks at its ends.

    A bin that is too narrow to be seen, as that of the one value 0 under a limit of 0, is drawn wider. A limit beyond the
    axis stands between the blocks that it parts, and nowhere when it parts none.
    """
    before = [found for found in one.bins if found.start < one.low and found.count]
    after = [found for found in one.bins if found.end > math.nextafter(one.high, math.inf) and found.count]
    inside = [found for found in one.bins if found.start >= one.low and found.end <= math.nextafter(one.high, math.inf)]
    start, end = len(before) * (_BLOCK + _GAP), _WIDTH - len(after) * (_BLOCK + _GAP)
    natural = [(end - start) * (found.end - found.start) / (one.high - one.low) for found in inside]
    widths = [max(width, _NARROWEST if found.count else 0.0) for found, width in zip(inside, natural, strict=True)]
    ends = [start + (end - start) * width / sum(widths) for width in accumulate(widths, initial=0.0)]

    bars = [(found, number * (_BLOCK + _GAP), _BLOCK) for number, found in enumerate(before)]
    bars += [(found, left, right - left) for found, (left, right) in zip(inside, pairwise(ends), strict=True) if found.count]
    bars += [(found, end + _GAP + number * (_BLOCK + _GAP), _BLOCK) for number, found in enumerate(after)]
    limits = [
        left for (one_bin, left), (next_bin, _) in pairwise(zip(inside, ends[1:], strict=True)) if one_bin.kept != next_bin.kept
    ]
    if one.lowest is not None and one.lowest <= one.low:
        limits += [x + width + _GAP / 2 for found, x, width in bars if found.start < one.lowest]
    if one.highest is not None and one.highest >= one.high:
        limits += [x - _GAP / 2 for found, x, _ in bars if found.start > one.highest]
    return _Layout(bars, limits, start, end)


def _drawing(one: Histogram, name: str) -> Markup:
    layout, tallest = _layout(one), math.sqrt(max((found.count for found in one.bins), default=0) or 1)
    bars = (_bar(x, width, _HEIGHT * math.sqrt(found.count) / tallest, found.kept) for found, x, width in layout.bars)
    dashes = (
        Markup('<line class="limit" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="{1:.1f}"/>').format(x, _HEIGHT) for x in layout.limits
    )
    described = f"{figure(one.low)} to {figure(one.high)}, {one.documents:,} documents. {effect(one)}".strip()
    return Markup(
        '<svg viewBox="0 0 {0:g} {1:g}" xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="{2}-title {2}-desc">'
        '<title id="{2}-title">{3}</title><desc id="{2}-desc">{4}</desc>{5}{6}'
        '<line class="axis" x1="{7:.1f}" x2="{8:.1f}" y1="{9:g}" y2="{9:g}"/>'
        '<text x="{7:.1f}" y="{1:g}">{10}</text><text class="end" x="{8:.1f}" y="{1:g}">{11}</text></svg>'
    ).format(
        _WIDTH,
        _HEIGHT + _LABELS,
        name,
        display_name(one.column),
        described,
        Markup("").join(bars),
        Markup("").join(dashes),
        layout.start,
        layout.end,
        _HEIGHT,
        figure(one.low),
        figure(one.high),
    )


def _bar(x: float, width: float, height: float, kept: bool) -> Markup:
    height = max(height, 1.0)
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
        "kept" if kept else "dropped", x, _HEIGHT - height, max(width - 0.5, 0.5), height
    )


def figure(value: float | None) -> str:
    """A score or limit as it is written: `0.65`, `100,000`, `12.3`."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
