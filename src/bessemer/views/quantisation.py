"""What quantising cost and saved: rows for the terminal and a section of the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from bessemer.core.progress import size
from bessemer.views import tables
from bessemer.views.run_data import Metrics

_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("bytes", "Size", size),
    ("bits_per_byte", "Bits per byte", lambda value: f"{value:.4f}"),
    ("tokens_per_second", "Tokens per second, 8 answers at once", lambda value: f"{value:,.0f}"),
    ("cost_per_million_tokens", "Cost of a million tokens", lambda value: f"{value:.3g}"),
)


def quality_table(quality: Metrics) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, before and after; a figure that was not taken has no column."""
    known = [column for column in _COLUMNS if any(column[0] in quality[name] for name in ("original", "quantised"))]
    named = {"original": "before", "quantised": f"after: {quality['scheme']}, {quality['method']}"}
    rows = [
        [label, *(show(quality[name][key]) if key in quality[name] else "–" for key, _, show in known)]
        for name, label in named.items()
    ]
    return ["Model", *(heading for _, heading, _ in known)], rows


def quality_sentences(quality: Metrics) -> list[str]:
    """What the table does not say."""
    lines = []
    if "kl_per_token" in quality:
        lines.append(
            f"On {quality['compared_tokens']:,} held-out tokens: {quality['loss']:+.2%} bits per byte, a divergence from the "
            f"original of {quality['kl_per_token']:.2g} nats a token, and the same likeliest token after "
            f"{quality['top_agreement']:.1%} of them."
        )
        before, after = (quality[name].get("arithmetic") for name in ("original", "quantised"))
        if before and after:
            lines.append(f"Measured as they are served here. Before: {before}. After: {after}.")
    return lines + [f"{note[0].upper()}{note[1:]}." for note in quality.get("notes", ())]


def quantisation(quality: Metrics | None) -> Markup:
    """The report's section; empty where nothing was quantised."""
    if quality is None:
        return Markup("")
    headings, rows = quality_table(quality)
    columns = [tables.Column(heading, place > 0) for place, heading in enumerate(headings)]
    words = "The same model with weights of fewer bits: what that saves, and what it costs in quality."
    return tables.lead(words) + tables.table(columns, rows) + Markup("").join(map(tables.soft, quality_sentences(quality)))
