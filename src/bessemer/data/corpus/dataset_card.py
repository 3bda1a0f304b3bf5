"""Dataset card of a corpus: what it holds, where it comes from, how it was made and what to know before using it.

Markdown with the heading that hubs of data sets read (`README.md`). It follows from the stages' settings and figures alone, so
that the same corpus has the same card.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.metrics import size
from bessemer.core.store import MANIFEST, read_json, write_text
from bessemer.data.filters.registry import column_description

CARD = "README.md"
_DOMAINS = 20
#: As hubs of data sets write them.
_SPDX = """
    mit apache-2.0 bsd-2-clause bsd-3-clause mpl-2.0 cc0-1.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 gpl-2.0 gpl-3.0 lgpl-3.0
    agpl-3.0
"""
_LICENSES = frozenset(_SPDX.split())
_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"), (1e8, "10M<n<100M"))
_FIELDS = {
    "id": "128-bit hash of the source and a stable place in it; the same in every stage",
    "text": "the document",
    "text_hash": "equal for texts that differ in white space alone",
    "source": "the recipe's name for where it comes from",
    "url": "its address, where it has one",
    "language": "ISO 639 code",
    "license": "what its source states",
    "split": "`train` or `validation`",
    "metadata": "what else the source says, `opt_out` among it",
}


@dataclass(frozen=True)
class StageRecord:
    """A data stage by its manifest."""

    name: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]


def lineage(documents: Path) -> list[StageRecord]:
    """The stages that made a folder of documents, the first one first, as far as their manifests are in the same store."""
    records: list[StageRecord] = []
    folder: Path | None = documents.resolve().parent
    while folder is not None and (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST, "manifest")
        records.append(StageRecord(manifest["stage"], manifest["settings"], manifest["metrics"]))
        made_from = manifest["inputs"].get("documents")
        folder = folder.parent / made_from["key"] if made_from else None
    return records[::-1]


def write_card(out: Path, stages: Sequence[StageRecord]) -> None:
    """Write `README.md` into the folder of the last of these stages."""
    write_text(out / CARD, dataset_card(stages))


def dataset_card(stages: Sequence[StageRecord]) -> str:
    """The card of the corpus that these stages made, the first one first. Texts from outside are escaped."""
    last = stages[-1].metrics
    parts = [
        _front_matter(last),
        f"# A corpus of {last['documents_out']:,} documents",
        _summary(stages),
        "## Sources\n\n" + _before_and_after("Source", stages, "source"),
        _shares("## Languages", "Language", last.get("by_language", {})),
        _shares("## Licences", "Licence, as the source states it", last.get("by_license", {}), last["documents_out"]),
        _opt_outs(last),
        _shares("## Domains", "Domain", last.get("by_domain", {}), most=_DOMAINS),
        "## How it was made\n\n" + "\n".join(_step(record) for record in stages),
        _dropped(stages),
        _edited(stages),
        _thresholds(next((thresholds for record in stages if (thresholds := record.metrics.get("thresholds"))), {})),
        _fields(stages),
        _LIMITS,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(metrics: Mapping[str, Any]) -> str:
    languages = [name for name in _largest_first(metrics.get("by_language", {})) if name.isascii() and name.isalpha()]
    stated = {name.lower() if name.lower() in _LICENSES else "other" for name in metrics.get("by_license", {})}
    count = metrics["documents_out"]
    category = next((name for limit, name in _SIZES if count < limit), "n>100M")
    lines = [
        "---",
        *(["language:", *(f"- {name}" for name in languages)] if languages else []),
        *(["license:", *(f"- {name}" for name in sorted(stated))] if stated else []),
        "size_categories:",
        f"- {category}",
        "task_categories:",
        "- text-generation",
        "configs:",
        "- config_name: default",
        "  data_files: documents/*.parquet",
        "---",
    ]
    return "\n".join(lines)


def _summary(stages: Sequence[StageRecord]) -> str:
    first, last = stages[0].metrics, stages[-1].metrics
    text = (
        f"{size(last['bytes_out'])} of text, kept of {first['documents_in']:,} documents ({size(first['bytes_in'])}) that "
        "were collected."
    )
    splits = last.get("by_split", {})
    if splits:
        shares = ", ".join(f"{split['documents']:,} in `{name}`" for name, split in sorted(splits.items()))
        text += f" Splits: {shares}, by a hash of the package, file or record, so that neither holds a part of the other's."
    return text


def _before_and_after(heading: str, stages: Sequence[StageRecord], column: str) -> str:
    before, after = stages[0].metrics.get(f"by_{column}", {}), stages[-1].metrics.get(f"by_{column}", {})
    rows = []
    for name in _largest_first(before):
        kept = after.get(name, {"documents": 0, "bytes": 0})
        rows.append((name, f"{before[name]['documents']:,}", f"{kept['documents']:,}", size(kept["bytes"])))
    return _table((heading, "Collected", "Kept", "Text kept"), rows)


def _shares(
    title: str, heading: str, counted: Mapping[str, Mapping[str, int]], total: int | None = None, most: int | None = None
) -> str:
    """A table of counts, the largest first. total: of all documents, of which the others state nothing."""
    names = _largest_first(counted)
    rows = [(name, f"{counted[name]['documents']:,}", size(counted[name]["bytes"])) for name in names[:most]]
    unstated = 0 if total is None else total - sum(counts["documents"] for counts in counted.values())
    if unstated:
        rows.append(("(not stated)", f"{unstated:,}", ""))
    more = f"\n\nAnd {len(names) - most:,} others." if most is not None and len(names) > most else ""
    return f"{title}\n\n{_table((heading, 'Documents', 'Text'), rows)}{more}" if rows else ""


def _opt_outs(metrics: Mapping[str, Any]) -> str:
    objections = metrics.get("by_opt_out", {})
    if not objections:
        return ""
    total = sum(counts["documents"] for counts in objections.values())
    kinds = ", ".join(f"{_cell(name)} ({objections[name]['documents']:,})" for name in _largest_first(objections)[:5])
    return f"**Authors object to a use of {total:,} of these documents**: {kinds}. `metadata['opt_out']` marks them."


def _step(record: StageRecord) -> str:
    metrics, settings = record.metrics, record.settings
    gone = metrics["documents_in"] - metrics["documents_out"]
    words = {
        "collect": lambda: f"read {_names(source.get('name') or source['source'] for source in settings['sources'])}",
        "clean": lambda: (
            (f"edited the texts ({_names(settings['edit'])}) and " if settings.get("edit") else "")
            + f"scored them ({_names(settings['score'])})"
        ),
        "deduplicate": lambda: f"removed copies ({_names(settings['methods'])}), of which {_what_stays(settings)} stays",
        "select": lambda: (
            f"kept what passes {_names(settings['keep'])}"
            + (f", in {_names(settings['languages'])}" if settings.get("languages") else "")
            + f" ({len(metrics.get('thresholds', {}))} thresholds)"
        ),
    }
    what = words[record.name]() if record.name in words else "changed the documents"
    result = f"{metrics['documents_out']:,} documents, {size(metrics['bytes_out'])}"
    return f"1. **{record.name}** {what}: {result}{f', {gone:,} dropped' if gone else ''}."


def _what_stays(settings: Mapping[str, Any]) -> str:
    keep = settings.get("keep", {})
    quality = f", then the best by {_names(keep['quality'])}" if keep.get("quality") else ""
    licences = f", first of {_names(keep['licenses'])}" if keep.get("licenses") else ""
    return f"one with a stated licence{licences}{quality}, then the smallest id"


def _names(names: Iterable[str]) -> str:
    return ", ".join(_code(name) for name in names)


def _dropped(stages: Sequence[StageRecord]) -> str:
    rows = [
        (record.name, reason, f"{counts['documents']:,}", size(counts["bytes"]))
        for record in stages
        for reason, counts in sorted(record.metrics["by_reason"].items(), key=lambda item: (-item[1]["documents"], item[0]))
    ]
    if not rows:
        return ""
    lead = "Each dropped document lies in its stage's folder `rejected`, with the first reason that was found.\n\n"
    return "## What was dropped\n\n" + lead + _table(("Stage", "Reason", "Documents", "Text"), rows)


def _edited(stages: Sequence[StageRecord]) -> str:
    counted: Mapping[str, Any] = next((record.metrics["counted"] for record in stages if record.metrics.get("counted")), {})
    rows = [
        (column_description(column) or _code(column), f"{amount['total']:,}", f"{amount['documents']:,}")
        for column, amount in counted.items()
        if amount["total"]
    ]
    return "## What was edited\n\n" + _table(("Found", "Times", "In documents"), rows, escaped=1) if rows else ""


def _thresholds(thresholds: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            _code(column),
            column_description(column),
            "–" if threshold["lowest"] is None else f"{threshold['lowest']:g}",
            "–" if threshold["highest"] is None else f"{threshold['highest']:g}",
            f"{threshold['outside']:,}",
            f"{threshold['alone']:,}",
        )
        for column, threshold in thresholds.items()
    ]
    if not rows:
        return ""
    lead = "How many documents lie outside each limit, and how many break no other.\n\n"
    headings = ("Score", "Meaning", "Lowest", "Highest", "Outside", "This alone")
    return "## Thresholds\n\n" + lead + _table(headings, rows, escaped=2)


def _fields(stages: Sequence[StageRecord]) -> str:
    scores = dict.fromkeys(column for record in stages for column in record.metrics.get("scores", {}))
    fields = _FIELDS | {column: column_description(column) for column in scores}
    lead = "`documents/` holds Parquet files, sorted by id; `rejected/` the same columns and a `reason`.\n\n"
    rows = [(_code(name), text) for name, text in fields.items()]
    return "## Fields\n\n" + lead + _table(("Column", "Meaning"), rows, escaped=2)


_LIMITS = """\
## Before you use it

- Scores come from rules, word lists and small models. They err in both directions, most in languages other than English and
  in text unlike what they were made on; the examples in the report show how.
- Licences are what the sources state. Nobody has checked that those who state them hold the rights.
- Personal data and secrets are found by their form. What has no telling form (names, stories about people) stays.
- `bessemer forget ID` takes a document out and names what was made from it."""


def _largest_first(counted: Mapping[str, Mapping[str, int]]) -> list[str]:
    return sorted(counted, key=lambda name: (-counted[name]["documents"], name))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], escaped: int = 0) -> str:
    """A Markdown table; all cells but the first `escaped` are escaped here. Figures are set to the right."""
    figures = [
        bool(rows) and all(row[place][:1].isdigit() or row[place] in ("–", "") for row in rows)
        for place in range(len(headings))
    ]
    lines = [
        "| " + " | ".join(headings) + " |",
        "|" + "|".join(" ---: " if right else " --- " for right in figures) + "|",
        *("| " + " | ".join(cell if place < escaped else _cell(cell) for place, cell in enumerate(row)) + " |" for row in rows),
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text from outside in one line, in which Markdown and HTML mean nothing."""
    return re.sub(r"[\\`*\[\]<>|&~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", _in_one_line(text))


def _code(text: str) -> str:
    """A name in code: nothing in it means anything but the sign that ends it, and a table's."""
    return "`" + _in_one_line(text).replace("`", "'").replace("|", "\\|") + "`"


def _in_one_line(text: str) -> str:
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())
