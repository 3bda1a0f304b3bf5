"""Bars inside tables, drawn by the style sheet."""

from __future__ import annotations

from markupsafe import Markup


def bar(share: float, rest: float = 0.0) -> Markup:
    """A horizontal bar of `share` of its place (0 … 1), and beside it a hatched one for what is gone."""
    parts = Markup('<i style="width:{:.2f}%"></i>').format(100 * max(share, 0.0))
    if rest > 0:
        parts += Markup('<i class="gone" style="width:{:.2f}%"></i>').format(100 * rest)
    return Markup('<span class="bar" aria-hidden="true">{}</span>').format(parts)


def measured(share: float, figure: str) -> Markup:
    """A figure with its bar before it, all bars of a column of one length."""
    return Markup('<span class="measured">{}<span>{}</span></span>').format(bar(share), figure)
