"""Data for a terminal: a corpus, as `bessemer show CORPUS` prints it, and the tokens that a model learns of rows, as
`bessemer data preview --model` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bessemer.core.metrics import label, percent, short_number, size
from bessemer.core.report import Histogram
from bessemer.data import report as corpus
from bessemer.views.elements import printable, visible
from bessemer.views.parts_terminal import bar_text, listing, literal, section

if TYPE_CHECKING:
    from bessemer.posttraining.data.mask import MaskedToken, MaskPreview

_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 32
_KEPT, _DROPPED = "#d9622b", "dim"
#: Styles of learnt tokens, which alternate so that neighbours differ; of end tokens; of tokens that are only context.
_LEARNT = ("#f0ece4 on #1e5c3a", "#f0ece4 on #2f7a52")
_END, _CONTEXT = "bold #1b1b1b on #e8b04a", "dim"
#: Signs around learnt tokens and after an end token, for output without colours.
_OPENED, _CLOSED, _ENDED = "⟦", "⟧", "■"


def show_corpus(stages: corpus.Stages, *, examples: int = 2, rows: int = 12) -> RenderableType:
    """Data stages and their metrics, in order: what each kept, reasons, thresholds, copies, edits, groups, things to read.

    examples: texts kept, and texts dropped for each reason. rows: of each table, before the rest is only counted.
    """
    parts: list[RenderableType] = [_kept(stages)]
    for name, metrics in stages.items():
        if metrics.get("by_reason"):
            parts += section(f"Dropped by {name}", _reasons(metrics["by_reason"]))
    stage, histograms = corpus.scores_stage(stages)
    if limited := [histogram for histogram in histograms if histogram.limit]:
        parts += section(f"Thresholds of {stage}", _histograms(limited))
    if free := [histogram for histogram in histograms if not histogram.limit]:
        parts += section("Scores without a threshold", _histograms(free))
    for metrics in stages.values():
        for method, duplicates in metrics.get("duplicates", {}).items():
            parts += section(
                f"Copies found by {method}" if "clusters" in duplicates else f"Cut by {method}", _copies(duplicates)
            )
    if edits := corpus.edits(stages):
        counts = [(what, f"{total:,}", f"{documents:,}") for what, total, documents in edits]
        parts += section("Edits", listing("Found by the edits", "times", "in documents", rows=counts))
    for column, (title, heading) in corpus.COUNTED.items():
        if groups := corpus.before_and_after(stages, column):
            parts += section(title, _groups(heading, groups, rows))
    if problems := corpus.set_aside(stages):
        set_aside = [(source, label(kind), f"{count:,}") for source, kind, count in problems]
        parts += section("Set aside while reading", listing("Source", "", "how many", rows=set_aside))
    return Group(*parts, *_examples(stages, examples))


def _kept(stages: corpus.Stages) -> Table:
    table = listing("After", "", "documents", "text", "dropped")
    largest = max((metrics["bytes_in"] for metrics in stages.values()), default=0) or 1
    for name, metrics in stages.items():
        dropped = metrics["documents_in"] - metrics["documents_out"]
        table.add_row(
            literal(name),
            bar_text(metrics["bytes_out"] / largest),
            f"{metrics['documents_out']:,}",
            size(metrics["bytes_out"]),
            f"{dropped:,} ({percent(dropped / metrics['documents_in'])})" if dropped else "–",
        )
    return table


def _reasons(by_reason: Mapping[str, Mapping[str, int]]) -> Table:
    ordered = sorted(by_reason.items(), key=lambda item: (-item[1]["documents"], item[0]))
    rows = [(label(reason), f"{counts['documents']:,}", size(counts["bytes"])) for reason, counts in ordered]
    return listing("Reason", "documents", "text", rows=rows)


def _histograms(histograms: Sequence[Histogram]) -> Table:
    """A line for each score: where its axis begins, a curve whose dropped part is dim, where it ends, what the limit does."""
    limited = any(histogram.limit for histogram in histograms)
    table = listing("Score", "from", "", "to", *(("kept", "outside", "only this") if limited else ()))
    table.columns[2].justify = table.columns[3].justify = "left"
    for histogram in histograms:
        effect: list[RenderableType] = []
        if limited:
            effect = [
                literal(histogram.limit),
                *("–" if count is None else f"{count:,}" for count in (histogram.outside, histogram.alone)),
            ]
        table.add_row(
            literal(histogram.title), short_number(histogram.low), spark(histogram), short_number(histogram.high), *effect
        )
    if limited:
        table.columns[4].justify = "left"
    return table


def spark(histogram: Histogram, width: int = _SPARK_WIDTH) -> Text:
    """A histogram in one line: heights are square roots of counts, dim is what lies outside the limits, `┊` is a limit.

    What lies beyond the axis is counted at its ends.
    """
    # kept, dropped
    counts = [[0, 0] for _ in range(width)]
    span = histogram.high - histogram.low
    for bin in histogram.bins:
        middle = (max(bin.start, histogram.low) + min(bin.end, histogram.high)) / 2
        place = min(max(int((middle - histogram.low) / span * width), 0), width - 1)
        counts[place][not bin.kept] += bin.count
    tallest = math.sqrt(max((sum(pair) for pair in counts), default=0) or 1)
    limits = {
        round((limit - histogram.low) / span * width)
        for limit in (histogram.lowest, histogram.highest)
        if limit is not None and histogram.low < limit <= histogram.high
    }
    text = Text()
    for place, (kept, dropped) in enumerate(counts):
        if place in limits:
            text.append("┊")
        height = math.sqrt(kept + dropped) / tallest
        sign = _SPARKS[min(int(height * len(_SPARKS)), len(_SPARKS) - 1)] if kept + dropped else " "
        text.append(sign, _KEPT if kept >= dropped else _DROPPED)
    return text.append("┊") if width in limits else text


def _copies(duplicates: Mapping[str, Any]) -> RenderableType:
    if "clusters" not in duplicates:
        return literal(corpus.passages(duplicates))
    if not duplicates["clusters"]:
        return literal("No copies.")
    rows = [(corpus.sizes(row), f"{row['clusters']:,}", f"{row['documents']:,}") for row in duplicates["by_size"]]
    return listing("Documents in a cluster", "clusters", "documents in them", rows=rows)


def _groups(heading: str, groups: Sequence[corpus.Group], rows: int) -> Table:
    table = listing(heading, "documents", "kept", "text", "kept", " ")
    table.columns[-1].justify = "left"
    largest = max((group.bytes for group in groups), default=0) or 1
    for group in groups[:rows]:
        kept = ("–", "–") if group.kept is None or group.kept_bytes is None else (f"{group.kept:,}", size(group.kept_bytes))
        table.add_row(
            literal(group.name),
            f"{group.documents:,}",
            kept[0],
            size(group.bytes),
            kept[1],
            bar_text(group.kept_bytes / largest) if group.kept_bytes else "",
        )
    if len(groups) > rows:
        table.add_row(literal(f"and {len(groups) - rows:,} more", "dim"))
    return table


def _examples(stages: corpus.Stages, wanted: int) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if not wanted:
        return parts
    for metrics in stages.values():
        for documents in metrics.get("examples", {}).get("dropped", {}).values():
            for document in documents[:wanted]:
                parts += section(f"Dropped: {document.get('reason')}", _document(document))
    for document in (list(stages.values())[-1].get("examples", {}).get("kept", []) if stages else [])[:wanted]:
        parts += section("Kept", _document(document))
    return parts


def _document(document: Mapping[str, Any]) -> RenderableType:
    known = [document.get("source"), document.get("id")]
    return Group(literal(" · ".join(str(value) for value in known if value)), literal(document["text"], "dim"))


# ------------------------------------------------------------------------------------------------------- learnt rows


def show_masks(preview: MaskPreview) -> RenderableType:
    """Rows as a model learns them: figures, a legend, then each row, its learnt tokens in colour and end tokens in another."""
    legend = Text.assemble(
        ("context", _CONTEXT), "  ", (f"{_OPENED}learnt{_CLOSED}", _LEARNT[0]), "  ", (f"end token{_ENDED}", _END)
    )
    parts: list[RenderableType] = [*(Text(printable(sentence)) for sentence in preview.sentences), legend]
    for row in preview.rows:
        for number, example in enumerate(row.examples, start=1):
            of = f", example {number} of {len(row.examples)}" if len(row.examples) > 1 else ""
            parts += [Text(f"\n{row.place}{of}", style="bold"), _example_text(example)]
        if row.reason:
            parts += [Text(f"\n{row.place}", style="bold"), Text(f"left out: {printable(row.reason)}")]
    return Group(*parts)


def _example_text(example: Sequence[MaskedToken]) -> Text:
    """The tokens of an example."""
    text = Text()
    was_learnt = False
    for number, token in enumerate(example):
        if token.is_learnt != was_learnt:
            text.append(_OPENED if token.is_learnt else _CLOSED, style="bold")
            was_learnt = token.is_learnt
        style = _END if token.is_end else _LEARNT[number % 2] if token.is_learnt else _CONTEXT
        text.append(_shown(token), style=style)
    if was_learnt:
        text.append(_CLOSED, style="bold")
    return text


def _shown(token: MaskedToken) -> str:
    """A token's text: as it is in the context, with signs for white space where it is learnt."""
    if token.is_end:
        return visible(token.text) + _ENDED
    return visible(token.text).replace("·", " ").replace("↵", "↵\n") if token.is_learnt else printable(token.text)
