"""Histograms of scores, each with its thresholds: small drawings that take their colours from the page.

Heights are square roots of counts, so that the few documents beside a threshold are seen next to the many far from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from markupsafe import Markup

from bessemer.core.figures import short_number
from bessemer.core.report import Bin, Histogram

_WIDTH, _HEIGHT, _LABELS = 240.0, 64.0, 14.0
#: Width of the block that stands at the end of the axis for what lies beyond it, and its distance from the axis.
_BLOCK, _GAP = 9.0, 5.0
_NARROWEST = 3.0


def drawings(histograms: Sequence[Histogram], ids: Iterator[str]) -> Markup:
    """Histograms side by side. ids: names for the drawings, unique in the page."""
    return Markup('<div class="histograms">{}</div>').format(Markup("").join(_figure(one, next(ids)) for one in histograms))


def _figure(one: Histogram, name: str) -> Markup:
    return Markup('<figure class="histogram"><figcaption>{} <span class="soft">{}</span></figcaption>{}</figure>').format(
        one.title, one.effect, _drawing(one, name)
    )


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
    described = f"{short_number(one.low)} to {short_number(one.high)}, {one.documents:,} documents. {one.effect}".strip()
    return Markup(
        '<svg viewBox="0 0 {0:g} {1:g}" xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="{2}-title {2}-desc">'
        '<title id="{2}-title">{3}</title><desc id="{2}-desc">{4}</desc>{5}{6}'
        '<line class="axis" x1="{7:.1f}" x2="{8:.1f}" y1="{9:g}" y2="{9:g}"/>'
        '<text x="{7:.1f}" y="{1:g}">{10}</text><text class="end" x="{8:.1f}" y="{1:g}">{11}</text></svg>'
    ).format(
        _WIDTH,
        _HEIGHT + _LABELS,
        name,
        one.title,
        described,
        Markup("").join(bars),
        Markup("").join(dashes),
        layout.start,
        layout.end,
        _HEIGHT,
        short_number(one.low),
        short_number(one.high),
    )


def _bar(x: float, width: float, height: float, kept: bool) -> Markup:
    height = max(height, 1.0)
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
        "kept" if kept else "dropped", x, _HEIGHT - height, max(width - 0.5, 0.5), height
    )
