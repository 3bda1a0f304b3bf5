"""The data's way through the stages: what came in, what was kept, what was dropped and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bessemer.core.progress import size
from bessemer.views.bars import bar, measured
from bessemer.views.examples import documents
from bessemer.views.figures import label, percent
from bessemer.views.tables import Column, table


def funnel(stages: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Bars of bytes by stage, all to the scale of the largest, each with its reasons for dropping.

    stages: name to the data stage's metrics (`documents_in/out`, `bytes_in/out`, `by_reason`), in order.
    """
    largest = max((metrics["bytes_in"] for metrics in stages.values()), default=0) or 1
    rows = [
        (
            Markup("<b>{}</b>").format(name),
            bar(metrics["bytes_out"] / largest, (metrics["bytes_in"] - metrics["bytes_out"]) / largest),
            f"{metrics['documents_out']:,}",
            size(metrics["bytes_out"]),
            _dropped(metrics),
        )
        for name, metrics in stages.items()
    ]
    columns = [
        Column("After"),
        Column("Kept"),
        Column("Documents", True),
        Column("Text", True),
        Column("Documents dropped", True),
    ]
    return Markup('<div class="funnel">{}</div>').format(table(columns, rows))


def _dropped(metrics: Mapping[str, Any]) -> str:
    dropped = metrics["documents_in"] - metrics["documents_out"]
    return f"{dropped:,} ({percent(dropped / metrics['documents_in'])})" if dropped else "–"


def reasons(by_reason: Mapping[str, Mapping[str, int]], found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """Why documents were dropped, the most frequent reason first, each with the examples `found` folded away below it."""
    most = max((counts["documents"] for counts in by_reason.values()), default=0) or 1
    return Markup("").join(
        Markup(
            '<details class="reason-row"><summary><span>{}</span>{}<span class="soft">{}</span></summary>{}</details>'
        ).format(
            label(reason),
            measured(counts["documents"] / most, f"{counts['documents']:,}"),
            size(counts["bytes"]),
            documents(found.get(reason, ())),
        )
        for reason, counts in sorted(by_reason.items(), key=lambda item: (-item[1]["documents"], item[0]))
    )
