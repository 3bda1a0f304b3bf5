"""A corpus: what it consisted of before and consists of after its stages, its thresholds, its copies, what was set aside.

`line`: data stage to its metrics, in the order in which they ran, as the stages' manifests hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from bessemer.core.progress import size
from bessemer.views import examples
from bessemer.views.bars import bar, measured
from bessemer.views.figures import label
from bessemer.views.funnel import funnel, reasons
from bessemer.views.scores import Histogram, drawings, histograms
from bessemer.views.tables import Column, lead, soft, table

Line = Mapping[str, Mapping[str, Any]]

#: Rows of a table before the rest is folded away.
_ROWS = 12
#: As many domains as a stage's metrics name: of others it is not known whether they are still there.
_NAMED_DOMAINS = 100

#: Columns by whose values a corpus is counted, with the heading of their table.
COUNTED = {
    "source": ("By source", "Source"),
    "language": ("By language", "Language"),
    "license": ("By licence, as the source states it", "Licence"),
    "domain": ("By domain", "Domain"),
    "split": ("Train and validation", "Split"),
}


@dataclass(frozen=True)
class Group:
    """The documents of one source, language or domain, before and after. `kept` is None where it is not known."""

    name: str
    documents: int
    bytes: int
    kept: int | None
    kept_bytes: int | None


def before_and_after(line: Line, column: str) -> list[Group]:
    """The groups of a column, the largest first: as the first stage that knows them took them in, and as the last left them."""
    known = [metrics for metrics in line.values() if metrics.get(f"by_{column}") or metrics.get(f"rejected_by_{column}")]
    if not known:
        return []
    first, after = known[0], list(line.values())[-1].get(f"by_{column}", {})
    nothing = {"documents": 0, "bytes": 0}
    before: dict[str, tuple[int, int]] = {}
    for side in (first.get(f"by_{column}", {}), first.get(f"rejected_by_{column}", {})):
        for name, found in side.items():
            documents, bytes_ = before.get(name, (0, 0))
            before[name] = documents + found["documents"], bytes_ + found["bytes"]
    is_cut = column == "domain" and len(after) >= _NAMED_DOMAINS
    groups = []
    for name in sorted(before | after, key=lambda name: (-before.get(name, (0, 0))[1], name)):
        kept = after.get(name, None if is_cut else nothing)
        documents, bytes_ = before.get(name) or (after[name]["documents"], after[name]["bytes"])
        groups.append(Group(name, documents, bytes_, kept and kept["documents"], kept and kept["bytes"]))
    return groups


def corpus(line: Line) -> Markup:
    """The whole of it, for the report's section on data."""
    last = list(line.values())[-1]
    parts = [
        lead("What came in and what each stage let through. The hatched end of a bar is what that stage dropped."),
        funnel(line),
    ]
    for name, metrics in line.items():
        if metrics.get("by_reason"):
            dropped = metrics.get("examples", {}).get("dropped", {})
            parts.append(Markup("<h3>Dropped by {}</h3>{}").format(name, reasons(metrics["by_reason"], dropped)))
    parts += [_scores(line), _duplicates(line), _edited(line)]
    for column, (title, heading) in COUNTED.items():
        if groups := before_and_after(line, column):
            parts.append(Markup("<h3>{}</h3>{}").format(title, groups_table(heading, groups)))
    parts.append(_set_aside(line))
    if kept := last.get("examples", {}).get("kept"):
        parts.append(Markup("<h3>Examples kept</h3>{}").format(examples.documents(kept)))
    return Markup("").join(parts)


def groups_table(heading: str, groups: Sequence[Group]) -> Markup:
    """Groups before and after: the bar is the text that came in, its hatched end what is gone. Small ones are folded away."""
    largest = max((group.bytes for group in groups), default=0) or 1
    rows = [
        (
            group.name,
            bar((group.bytes - _gone(group)) / largest, _gone(group) / largest),
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
    shown = Markup('<div class="groups">{}</div>').format(table(columns, rows[:_ROWS]))
    if len(rows) <= _ROWS:
        return shown
    return shown + folded(
        f"{len(rows) - _ROWS:,} more", Markup('<div class="groups">{}</div>').format(table(columns, rows[_ROWS:]))
    )


def _gone(group: Group) -> int:
    return 0 if group.kept_bytes is None else max(group.bytes - group.kept_bytes, 0)


def folded(summary: str, body: Markup) -> Markup:
    """Something that is opened when it is wanted."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, body)


def scores_stage(line: Line) -> tuple[str, list[Histogram]]:
    """The stage whose scores are shown, with their histograms: the one that applied thresholds, else the last with scores."""
    with_scores = [name for name, metrics in line.items() if metrics.get("thresholds") or metrics.get("scores")]
    chosen = next((name for name in with_scores if line[name].get("thresholds")), with_scores[-1] if with_scores else "")
    return (chosen, histograms(line[chosen])) if chosen else ("", [])


def _scores(line: Line) -> Markup:
    stage, found = scores_stage(line)
    if not found:
        return Markup("")
    sharp = [one for one in found if one.outside]
    idle = [one for one in found if one.limit and not one.outside]
    free = [one for one in found if not one.limit]
    parts = [
        Markup("<h3>Scores and thresholds</h3>"),
        soft(
            f"How the documents that came to {stage} score. What is pale lies outside a threshold, drawn as a dashed line; "
            "what lies beyond the axis stands as a block at its end. Heights are square roots of counts, so that rare scores "
            "are seen."
        ),
        drawings(sharp, name="limits"),
    ]
    if idle:
        parts.append(folded(f"{len(idle)} thresholds that drop no document", drawings(idle, name="idle")))
    if free:
        parts.append(folded(f"{len(free)} scores without a threshold", drawings(free, name="scores")))
    return Markup("").join(parts)


def _duplicates(line: Line) -> Markup:
    parts = []
    for metrics in line.values():
        for method, found in metrics.get("duplicates", {}).items():
            body = clusters(found) if "clusters" in found else soft(passages(found))
            parts.append(Markup("<h4>{}</h4>{}").format(label(method), body))
    return Markup("<h3>Duplicates</h3>{}").format(Markup("").join(parts)) if parts else Markup("")


def passages(found: Mapping[str, Any]) -> str:
    """What a method that cuts pieces out of texts did."""
    return f"{found['passages']:,} passages were cut out of {found['documents_cut']:,} documents."


def clusters(found: Mapping[str, Any]) -> Markup:
    """Clusters of copies by size, a survivor counted with what it replaced, and the largest with their texts."""
    if not found["clusters"]:
        return soft("No copies.")
    most = max(row["clusters"] for row in found["by_size"])
    rows = [
        (sizes(row), measured(row["clusters"] / most, f"{row['clusters']:,}"), f"{row['documents']:,}")
        for row in found["by_size"]
    ]
    columns = [Column("Documents in a cluster"), Column("Clusters", True), Column("Documents in them", True)]
    return table(columns, rows) + Markup("").join(
        folded(f"A cluster of {one['size']:,}", Markup("").join(_member(member) for member in [one, *one["members"]]))
        for one in found["largest"]
    )


def _member(member: Mapping[str, Any]) -> Markup:
    similarity = (
        f"similarity {member['similarity']:.2f}" if "similarity" in member else "stays" if "size" in member else "dropped"
    )
    return examples.documents([{"id": member["id"], "reason": similarity, "text": member["text"] or "(no longer there)"}])


def sizes(row: Mapping[str, int]) -> str:
    """A range of sizes in words."""
    return str(row["from"]) if row["from"] == row["to"] else f"{row['from']:,} to {row['to']:,}"


def _edited(line: Line) -> Markup:
    rows = edits(line)
    if not rows:
        return Markup("")
    columns = [Column("Edit"), Column("Times", True), Column("In documents", True)]
    return Markup("<h3>What the edits found</h3>{}").format(
        table(columns, [(name, f"{total:,}", f"{documents:,}") for name, total, documents in rows])
    )


def edits(line: Line) -> list[tuple[str, int, int]]:
    """What was counted while texts were edited: name, how often, in how many documents. What was not found is left out."""
    counted: Mapping[str, Any] = next((metrics["counted"] for metrics in line.values() if metrics.get("counted")), {})
    return [(label(column), found["total"], found["documents"]) for column, found in counted.items() if found["total"]]


def set_aside(line: Line) -> list[tuple[str, str, int]]:
    """What could not be read: source, kind, how many."""
    return [
        (source, kind, count)
        for metrics in line.values()
        for source, kinds in metrics.get("problems", {}).items()
        for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    ]


def _set_aside(line: Line) -> Markup:
    rows = set_aside(line)
    if not rows:
        return Markup("")
    shown = table(
        [Column("Source"), Column("What"), Column("How many", True)],
        [(source, label(kind), f"{count:,}") for source, kind, count in rows],
    )
    notes = [note for metrics in line.values() for found in metrics.get("notes", {}).values() for note in found]
    listed = (
        folded("Some of them, with their places", Markup("<pre>{}</pre>").format("\n".join(notes))) if notes else Markup("")
    )
    return Markup("<h3>Set aside while reading</h3>{}{}").format(shown, listed)
