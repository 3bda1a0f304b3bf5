"""Section of the data stages in a run's report: corpus before and after, reasons, scores, copies, edits, examples.

All data stages of a run share one section, which the last of them returns. `Stages` maps a data stage to its metrics, in the
order in which the stages ran, as their manifests hold them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bessemer.core.metrics import label, percent, size
from bessemer.core.report import (
    Bin,
    Cell,
    Column,
    Document,
    Documents,
    Folded,
    Heading,
    Histogram,
    Histograms,
    KeyFigure,
    Metrics,
    Part,
    Section,
    StageReport,
    Table,
    Text,
    Verbatim,
)
from bessemer.data.sources.source import NO_LOSS

Stages = Mapping[str, Metrics]

#: Most cases of unreadable input that the summary quotes.
_LOSSES = 3
#: Rows of a table before the rest is folded away.
_ROWS = 12
#: Domains that a stage's metrics name; of a domain beyond them it is unknown whether it is still there.
_NAMED_DOMAINS = 100
#: Stages that share the section.
_OURS = ("collect", "clean", "select", "deduplicate")
#: Metrics by which a stage is known to read documents and to write those that it keeps.
_DATA_METRICS = frozenset(("documents_in", "documents_out", "bytes_in", "bytes_out"))

#: Columns by whose values a corpus is counted, with the heading of their table.
COUNTED = {
    "source": ("By source", "Source"),
    "language": ("By language", "Language"),
    "license": ("By licence, as the source states it", "Licence"),
    "domain": ("By domain", "Domain"),
    "split": ("Train and validation", "Split"),
}


def report(stage: StageReport) -> Section | None:
    """The corpus as a whole, from the last data stage of the run; None from the others."""
    stages = _stages_up_to(stage)
    if stages is None:
        return None
    hint = (
        f"What became of a document, and why: bessemer explain ID --run {stage.run.name}, with the id that stands above its "
        "text."
    )
    return Section("Data", [*corpus_parts(stages), Text(hint)])


def summary_line(metrics: Metrics) -> str:
    """The numbers of documents that a stage kept and dropped, as a line."""
    dropped = metrics["documents_in"] - metrics["documents_out"]
    return f"{metrics['documents_out']:,} documents" + (f", {dropped:,} dropped" if dropped else "")


def sentences(stage: StageReport) -> list[str]:
    """Sentences on the size of the corpus before and after, from the last data stage."""
    stages = _stages_up_to(stage)
    if stages is None:
        return []
    metrics = list(stages.values())
    first, last = metrics[0], metrics[-1]
    lines = [
        f"Corpus: {first['documents_out']:,} documents ({size(first['bytes_out'])}) went in, "
        f"{last['documents_out']:,} ({size(last['bytes_out'])}) were kept."
    ]
    if first.get("skipped_sources"):
        lines.append(f"A source could not be reached and is missing: {', '.join(first['skipped_sources'])}.")
    return [*lines, *not_read(stages)]


def not_read(stages: Stages) -> list[str]:
    """Sentences on unreadable input: counts by kind, and the first cases with their reasons; empty where all was read."""
    kinds: dict[str, int] = {}
    for _, kind, count in set_aside(stages):
        if kind not in NO_LOSS:
            kinds[kind] = kinds.get(kind, 0) + count
    if not kinds:
        return []
    counted = ", ".join(f"{label(kind).lower()} ({count:,})" for kind, count in kinds.items())
    losses = [note for metrics in stages.values() for notes in metrics.get("losses", {}).values() for note in notes]
    return [f"Could not be read: {counted}.", *(f"– {note}." for note in losses[:_LOSSES])]


def key_figures(stage: StageReport) -> list[KeyFigure]:
    """The corpus's size, from the last data stage."""
    stages = _stages_up_to(stage)
    if stages is None:
        return []
    collected = size(next(iter(stages.values()))["bytes_out"])
    return [
        KeyFigure(value=size(list(stages.values())[-1]["bytes_out"]), label="of clean text", note=f"of {collected} collected")
    ]


def _stages_up_to(stage: StageReport) -> Stages | None:
    """The metrics of the run's data stages when `stage` is the last of them, else None."""
    of_documents = [one for one in stage.run.stages if one.metrics.keys() >= _DATA_METRICS]
    # a stage of another package has a section of its own
    ours = [one for one in of_documents if one.kind in _OURS]
    return {one.name: one.metrics for one in of_documents} if ours and ours[-1].name == stage.name else None


def corpus_parts(stages: Stages) -> list[Part]:
    """The whole corpus: what each stage kept, scores, copies, edits, groups, what was set aside, examples."""
    parts: list[Part] = [
        Text("What came in and what each stage let through. The hatched end of a bar is what that stage dropped.", lead=True),
        stages_table(stages),
    ]
    for name, metrics in stages.items():
        if metrics.get("by_reason"):
            dropped = metrics.get("examples", {}).get("dropped", {})
            parts += [Heading(f"Dropped by {name}"), *reasons(metrics["by_reason"], dropped)]
    parts += [*_scores(stages), *_duplicates(stages), *_edits(stages)]
    for column, (title, heading) in COUNTED.items():
        if groups := before_and_after(stages, column):
            parts += [Heading(title), *groups_tables(heading, groups)]
    parts += _set_aside(stages)
    last = list(stages.values())[-1]
    if kept := last.get("examples", {}).get("kept"):
        parts += [Heading("Examples kept"), documents(kept)]
    return parts


def stages_table(stages: Stages) -> Table:
    """Bytes by stage as bars, all to the scale of the largest, and the documents that each stage dropped. stages: name to the
    data stage's metrics (`documents_in/out`, `bytes_in/out`), in order."""
    largest = max((metrics["bytes_in"] for metrics in stages.values()), default=0) or 1
    rows = [
        (
            Cell(name, strong=True),
            Cell(share=metrics["bytes_out"] / largest, rest=(metrics["bytes_in"] - metrics["bytes_out"]) / largest),
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
    return Table(columns, rows, bars="large")


def _dropped(metrics: Metrics) -> str:
    dropped = metrics["documents_in"] - metrics["documents_out"]
    return f"{dropped:,} ({percent(dropped / metrics['documents_in'])})" if dropped else "–"


def reasons(by_reason: Mapping[str, Mapping[str, int]], examples: Mapping[str, Sequence[Metrics]]) -> list[Folded]:
    """Reasons for dropping documents, the most frequent first, each with its examples folded away below it."""
    most = max((counts["documents"] for counts in by_reason.values()), default=0) or 1
    return [
        Folded(
            (
                Cell(label(reason)),
                Cell(f"{counts['documents']:,}", share=counts["documents"] / most),
                Cell(remark=size(counts["bytes"])),
            ),
            [documents(examples.get(reason, ()))],
        )
        for reason, counts in sorted(by_reason.items(), key=lambda item: (-item[1]["documents"], item[0]))
    ]


def documents(examples: Sequence[Metrics]) -> Documents:
    """Documents of a data stage's `examples`: `text`, `source`, `id`, and for dropped ones `reason`."""
    return Documents(
        [Document(one["text"], one.get("source") or "", one.get("id") or "", one.get("reason") or "") for one in examples]
    )


def scores_stage(stages: Stages) -> tuple[str, list[Histogram]]:
    """The stage whose scores are shown, with their histograms: the one that applied thresholds, else the last with scores."""
    with_scores = [name for name, metrics in stages.items() if metrics.get("thresholds") or metrics.get("scores")]
    last = with_scores[-1] if with_scores else ""
    chosen = next((name for name in with_scores if stages[name].get("thresholds")), last)
    return (chosen, histograms(stages[chosen])) if chosen else ("", [])


def histograms(metrics: Metrics) -> list[Histogram]:
    """The scores of a data stage: those with a limit (`thresholds`) in their order, then the others (`scores`)."""
    limited = metrics.get("thresholds", {})
    others = {column: figures for column, figures in metrics.get("scores", {}).items() if column not in limited}
    return [*(_limited(column, figures) for column, figures in limited.items()), *(_free(*item) for item in others.items())]


def _title(column: str) -> str:
    # it imports pyarrow, which readers of other sections may lack
    from bessemer.data.thresholds import display_name

    return display_name(column)


def _limited(column: str, figures: Metrics) -> Histogram:
    lowest, highest = figures["lowest"], figures["highest"]
    edges = [-math.inf, *figures["edges"], math.inf]
    counts = [figures["below"], *figures["counts"], figures["above"]]
    bins = [
        Bin(start, end, count, (lowest is None or start >= lowest) and (highest is None or start <= highest))
        for (start, end), count in zip(pairwise(edges), counts, strict=True)
    ]
    return Histogram(
        title=_title(column),
        documents=figures["documents"],
        low=figures["low"],
        high=figures["high"],
        bins=bins,
        lowest=lowest,
        highest=highest,
        outside=figures["outside"],
        alone=figures["alone"],
    )


def _free(column: str, figures: Metrics) -> Histogram:
    low, high, counts = figures["low"], figures["high"], figures["counts"]
    edges = [low + (high - low) * place / len(counts) for place in range(len(counts) + 1)]
    edges = [-math.inf, *edges, math.inf]
    counts = [figures.get("below", 0), *counts, figures.get("above", 0)]
    bins = [Bin(start, end, count, True) for (start, end), count in zip(pairwise(edges), counts, strict=True)]
    return Histogram(title=_title(column), documents=sum(counts), low=low, high=high, bins=bins)


def _scores(stages: Stages) -> list[Part]:
    stage, drawn = scores_stage(stages)
    if not drawn:
        return []
    sharp = [one for one in drawn if one.outside]
    idle = [one for one in drawn if one.limit and not one.outside]
    free = [one for one in drawn if not one.limit]
    parts: list[Part] = [
        Heading("Scores and thresholds"),
        Text(
            f"How the documents that came to {stage} score. What is pale lies outside a threshold, drawn as a dashed line; "
            "what lies beyond the axis stands as a block at its end. Heights are square roots of counts, so that rare scores "
            "are seen."
        ),
        Histograms(sharp),
    ]
    if idle:
        parts.append(Folded(f"{len(idle)} thresholds that drop no document", [Histograms(idle)]))
    if free:
        parts.append(Folded(f"{len(free)} scores without a threshold", [Histograms(free)]))
    return parts


def _duplicates(stages: Stages) -> list[Part]:
    parts: list[Part] = []
    for metrics in stages.values():
        for method, summary in metrics.get("duplicates", {}).items():
            parts += [Heading(label(method), 4), *(clusters(summary) if "clusters" in summary else [Text(passages(summary))])]
    return [Heading("Duplicates"), *parts] if parts else []


def passages(summary: Metrics) -> str:
    """A sentence on a method that cuts passages out of texts."""
    return f"{summary['passages']:,} passages were cut out of {summary['documents_cut']:,} documents."


def clusters(summary: Metrics) -> list[Part]:
    """Clusters of copies by size, a survivor counted with what it replaced, and the largest with their texts."""
    if not summary["clusters"]:
        return [Text("No copies.")]
    most = max(row["clusters"] for row in summary["by_size"])
    rows = [
        (sizes(row), Cell(f"{row['clusters']:,}", share=row["clusters"] / most), f"{row['documents']:,}")
        for row in summary["by_size"]
    ]
    columns = [Column("Documents in a cluster"), Column("Clusters", True), Column("Documents in them", True)]
    return [
        Table(columns, rows),
        *(
            Folded(f"A cluster of {one['size']:,}", [Documents([_member(member) for member in (one, *one["members"])])])
            for one in summary["largest"]
        ),
    ]


def _member(member: Metrics) -> Document:
    if "similarity" in member:
        similarity = f"similarity {member['similarity']:.2f}"
    else:
        similarity = "stays" if "size" in member else "dropped"
    return Document(member["text"] or "(no longer there)", id=member["id"] or "", reason=similarity)


def sizes(row: Mapping[str, int]) -> str:
    """A range of sizes in words."""
    return str(row["from"]) if row["from"] == row["to"] else f"{row['from']:,} to {row['to']:,}"


def edits(stages: Stages) -> list[tuple[str, int, int]]:
    """Counts of edits: name, total, and documents with any. Edits that changed nothing are left out."""
    counted: Metrics = next((metrics["counted"] for metrics in stages.values() if metrics.get("counted")), {})
    return [(label(column), amount["total"], amount["documents"]) for column, amount in counted.items() if amount["total"]]


def _edits(stages: Stages) -> list[Part]:
    rows = [(name, f"{total:,}", f"{documents:,}") for name, total, documents in edits(stages)]
    if not rows:
        return []
    columns = [Column("Edit"), Column("Times", True), Column("In documents", True)]
    return [Heading("What the edits found"), Table(columns, rows)]


@dataclass(frozen=True)
class Group:
    """The documents of one source, language or domain, before and after. `kept` is None where it is not known."""

    name: str
    documents: int
    bytes: int
    kept: int | None
    kept_bytes: int | None


def before_and_after(stages: Stages, column: str) -> list[Group]:
    """The groups of a column, the largest first: as the first stage that knows them took them in, and as the last left them."""
    known = [metrics for metrics in stages.values() if metrics.get(f"by_{column}") or metrics.get(f"rejected_by_{column}")]
    if not known:
        return []
    first, after = known[0], list(stages.values())[-1].get(f"by_{column}", {})
    nothing = {"documents": 0, "bytes": 0}
    before: dict[str, tuple[int, int]] = {}
    for side in (first.get(f"by_{column}", {}), first.get(f"rejected_by_{column}", {})):
        for name, counts in side.items():
            documents, bytes_ = before.get(name, (0, 0))
            before[name] = documents + counts["documents"], bytes_ + counts["bytes"]
    is_cut = column == "domain" and len(after) >= _NAMED_DOMAINS
    groups = []
    for name in sorted(before | after, key=lambda name: (-before.get(name, (0, 0))[1], name)):
        kept = after.get(name, None if is_cut else nothing)
        documents, bytes_ = before.get(name) or (after[name]["documents"], after[name]["bytes"])
        groups.append(Group(name, documents, bytes_, kept and kept["documents"], kept and kept["bytes"]))
    return groups


def groups_tables(heading: str, groups: Sequence[Group]) -> list[Part]:
    """Groups before and after: the bar is the text that came in, its hatched end what is gone. Small ones are folded away."""
    largest = max((group.bytes for group in groups), default=0) or 1
    rows = [
        (
            group.name,
            Cell(share=(group.bytes - _gone(group)) / largest, rest=_gone(group) / largest),
            f"{group.documents:,}",
            "–" if group.kept is None else f"{group.kept:,}",
            size(group.bytes),
            "–" if group.kept_bytes is None else size(group.kept_bytes),
        )
        for group in groups
    ]
    columns = [
        Column(heading),
        Column("Text"),
        *(Column(name, True) for name in ("Documents", "kept", "Text", "kept")),
    ]
    parts: list[Part] = [Table(columns, rows[:_ROWS], bars="small")]
    if len(rows) > _ROWS:
        parts.append(Folded(f"{len(rows) - _ROWS:,} more", [Table(columns, rows[_ROWS:], bars="small")]))
    return parts


def _gone(group: Group) -> int:
    return 0 if group.kept_bytes is None else max(group.bytes - group.kept_bytes, 0)


def set_aside(stages: Stages) -> list[tuple[str, str, int]]:
    """Counts of unreadable input: source, kind, number."""
    return [
        (source, kind, count)
        for metrics in stages.values()
        for source, kinds in metrics.get("problems", {}).items()
        for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    ]


def _set_aside(stages: Stages) -> list[Part]:
    rows = [(source, label(kind), f"{count:,}") for source, kind, count in set_aside(stages)]
    if not rows:
        return []
    columns = [Column("Source"), Column("What"), Column("How many", True)]
    notes = [note for metrics in stages.values() for of_source in metrics.get("notes", {}).values() for note in of_source]
    listed = [Folded("Some of them, with their places", [Verbatim("\n".join(notes))])] if notes else []
    return [Heading("Set aside while reading"), Table(columns, rows), *listed]
