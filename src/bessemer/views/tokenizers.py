"""Tokenizers measured: by kind of text, beside each other, and beside the simplest ones there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bessemer.views.bars import measured
from bessemer.views.figures import baseline_label, label, percent
from bessemer.views.tables import Column, table

#: What a text costs, by the key in `by_domain`, and how it is called.
DOMAIN_FIGURES = {
    "bytes_per_token": "Bytes per token",
    "fertility": "Tokens per word",
    "tokens_to_english": "Tokens, English = 1",
}

_MUCH_UNKNOWN = 0.02
UNKNOWN_NOTE = "In brackets: more than 2 % of the tokens are unknown, and each of those may stand for a whole word."

Domains = Mapping[str, Mapping[str, Any]]


def domains_table(by_domain: Domains) -> Markup:
    """The samples, a row each: what a token holds of them, and whether decoding gives them back."""
    best = max(map(_length, by_domain.values()), default=0) or 1
    unknown = any(figures["unknown_share"] is not None for figures in by_domain.values())
    columns = [Column("Sample"), *(Column(name, True) for name in DOMAIN_FIGURES.values())]
    columns += [Column("Unknown", True)] * unknown + [Column("Given back")]
    rows = [
        (
            label(domain),
            measured(_length(figures) / best, figure(figures, "bytes_per_token")),
            figure(figures, "fertility"),
            figure(figures, "tokens_to_english"),
            *([figure(figures, "unknown_share")] * unknown),
            "exactly" if figures["round_trip"] else Markup('<span class="differs">not exactly</span>'),
        )
        for domain, figures in by_domain.items()
    ]
    drawn = table(columns, rows)
    if not all(map(mostly_written, by_domain.values())):
        drawn += Markup('<p class="soft">{}</p>').format(UNKNOWN_NOTE)
    return drawn


def _length(figures: Mapping[str, Any]) -> float:
    """Bytes per token for a bar: none for a sample that is mostly unknown."""
    return (figures["bytes_per_token"] or 0) if mostly_written(figures) else 0


def baselines_table(bytes_per_token: float, baselines: Mapping[str, float | None]) -> Markup:
    """A tokenizer's bytes per token beside those of the simplest tokenizers on the same text, the longest tokens first."""
    found = {baseline_label(name): (value, False) for name, value in baselines.items() if value is not None}
    ordered = sorted((found | {"This tokenizer": (bytes_per_token, True)}).items(), key=lambda item: -item[1][0])
    longest = ordered[0][1][0]
    rows = [
        (
            Markup("<b>{}</b>").format(name) if is_ours else Markup('{} <span class="soft">baseline</span>').format(name),
            measured(value / longest, f"{value:.2f}"),
        )
        for name, (value, is_ours) in ordered
    ]
    return table([Column("Held-out text"), Column("Bytes per token", True)], rows)


def figure(figures: Mapping[str, Any], name: str) -> str:
    """One figure of a sample, as a table shows it."""
    value = figures.get(name)
    if value is None:
        return "–"
    if name == "unknown_share":
        return percent(value)
    return f"{value:.2f}" if mostly_written(figures) else f"({value:.2f})"


def mostly_written(figures: Mapping[str, Any]) -> bool:
    """Whether so little of a sample is unknown that its figures say something: an unknown token may stand for a whole word."""
    return (figures.get("unknown_share") or 0) < _MUCH_UNKNOWN


def domains_of(tokenizers: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """The samples that have a figure of this name in some tokenizer, in order."""
    domains = dict.fromkeys(domain for one in tokenizers for domain in one["by_domain"])
    return [domain for domain in domains if any(one["by_domain"][domain].get(name) is not None for one in tokenizers)]
