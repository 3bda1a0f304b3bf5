"""Statistics of a data stage or a folder of documents: counts, bytes, reasons, examples, score histograms.

Ids are hashes, so the documents with the smallest ids are a fair sample, and the same one on every machine. A folder without a
manifest (a copy, or one made with the Python functions) is counted by reading it.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.corpus.reader import SCHEMA, TRAIN, document_files, read_part
from bessemer.data.thresholds import rule_of

_EXAMPLES = 4
_EXAMPLE_CHARACTERS = 600
_EXAMPLE_COLUMNS = ["id", "text", "source", "language"]
# documents of each part whose scores make the histograms
_SAMPLED_SCORES = 256
_BINS = 40
_DOMAINS = 100

#: Columns by whose values documents are counted, before and after a stage.
_COUNTED = ("source", "split", "language", "license")
#: The key of metadata that holds what an author objects to.
_OPT_OUT = "opt_out"


REASON = pa.field("reason", pa.string())


def with_reasons(batch: pa.RecordBatch, reasons: pa.Array) -> pa.RecordBatch:
    """The batch with the reason for each document, null for one that is kept."""
    return batch.append_column(REASON, reasons)


def kept_and_dropped(rows: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """The rows without a reason and those with one. Nothing is copied where all are of one kind."""
    reasons = rows.column("reason")
    if reasons.null_count == rows.num_rows:
        return rows, rows.slice(0, 0)
    if not reasons.null_count:
        return rows.slice(0, 0), rows
    return rows.filter(pc.is_null(reasons)), rows.filter(pc.is_valid(reasons))


class Totals(NamedTuple):
    """Totals of a part, which the stage's progress shows."""

    documents_in: int
    documents_out: int
    bytes_in: int


class PartStats:
    """The figures of one part, from batches of kept and rejected rows in the order of their ids."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, Counter[str]]] = {"kept": {}, "rejected": {}}
        self._sizes: dict[str, dict[str, Counter[str]]] = {"kept": {}, "rejected": {}}
        self._examples: dict[str, list[dict[str, Any]]] = {}
        self._scores: dict[str, list[np.ndarray]] = {}
        self._sampled = 0
        self._counted: dict[str, list[int]] = {}
        self._bytes_in: int | None = None

    def add(self, kept: pa.RecordBatch, rejected: pa.RecordBatch | None = None, *, read: pa.RecordBatch | None = None) -> None:
        """Count rows, kept and rejected. `rejected` has a `reason`; `read` is the batch before the stage edited its texts."""
        if read is not None:
            self._bytes_in = (self._bytes_in or 0) + (pc.sum(pc.binary_length(read.column("text"))).as_py() or 0)
        self._count("kept", kept)
        self._remember("kept", kept, pc.equal(kept.column("split"), TRAIN).to_numpy(zero_copy_only=False))
        if rejected is not None and rejected.num_rows:
            rules = _rules_of(rejected.column("reason"))
            self._count("rejected", rejected, rules)
            for number, rule in enumerate(rules.dictionary.to_pylist()):
                self._remember(f"dropped:{rule}", rejected, rules.indices.to_numpy() == number)
        for rows in (kept, rejected):
            if rows is not None:
                self._sum(rows)
        if self._sampled < _SAMPLED_SCORES:
            self._sample(kept if rejected is None else _in_order_of_ids(kept, rejected))

    def result(self) -> dict[str, Any]:
        """The figures as a JSON value, to be added up with those of the other parts."""
        sides = {
            side: {
                column: {value: [count, self._sizes[side][column][value]] for value, count in counts.items()}
                for column, counts in self._counts[side].items()
            }
            for side in self._counts
        }
        return {
            "sides": sides,
            "examples": self._examples,
            "scores": {column: _packed(np.concatenate(values)) for column, values in self._scores.items()},
            "counted": self._counted,
            "bytes_in": self._bytes_in,
        }

    def _count(self, side: str, rows: pa.RecordBatch, rules: pa.DictionaryArray | None = None) -> None:
        """Add documents and bytes to the counts of each value of the counted columns."""
        sizes = pc.binary_length(rows.column("text")).to_numpy(zero_copy_only=False)
        columns: dict[str, pa.Array] = {name: rows.column(name) for name in _COUNTED}
        columns["domain"] = _domains(rows.column("url"))
        columns[_OPT_OUT] = pc.map_lookup(rows.column("metadata"), pa.scalar(_OPT_OUT), "first")
        if rules is not None:
            columns["reason"] = rules
        if rows.num_rows:
            self._add(side, "all", "all", rows.num_rows, int(sizes.sum()))
        for column, values in columns.items():
            stated = pc.is_valid(values).to_numpy(zero_copy_only=False)
            if not stated.any():
                continue
            groups = pc.drop_null(values) if values.null_count else values
            if not pa.types.is_dictionary(groups.type):
                groups = groups.dictionary_encode()
            places = groups.indices.to_numpy(zero_copy_only=False)
            documents, bytes_ = np.bincount(places), np.bincount(places, weights=sizes[stated])
            for value, count, size in zip(groups.dictionary.to_pylist(), documents.tolist(), bytes_.tolist(), strict=True):
                self._add(side, column, value, count, int(size))

    def _add(self, side: str, column: str, value: str, documents: int, size: int) -> None:
        self._counts[side].setdefault(column, Counter())[value] += documents
        self._sizes[side].setdefault(column, Counter())[value] += size

    def _remember(self, name: str, rows: pa.RecordBatch, these: np.ndarray) -> None:
        """Keep the first of `these` rows, (N,) bool, while there are too few of the name."""
        examples = self._examples.setdefault(name, [])
        if len(examples) == _EXAMPLES:
            return
        wanted = [*_EXAMPLE_COLUMNS, *(["reason"] if "reason" in rows.schema.names else [])]
        first = np.flatnonzero(these)[: _EXAMPLES - len(examples)]
        for row in rows.select(wanted).take(pa.array(first)).to_pylist():
            examples.append(row | {"text": _shortened(row["text"])})

    def _sample(self, rows: pa.RecordBatch) -> None:
        """Scores of the first documents, kept or not: what thresholds are seen against."""
        some = rows.slice(0, _SAMPLED_SCORES - self._sampled)
        self._sampled += some.num_rows
        for field in some.schema if some.num_rows else ():
            if field.name not in SCHEMA.names and (pa.types.is_floating(field.type) or pa.types.is_integer(field.type)):
                values = pc.cast(some.column(field.name), pa.float64(), safe=False).to_numpy(zero_copy_only=False)
                self._scores.setdefault(field.name, []).append(values[np.isfinite(values)])

    def _sum(self, rows: pa.RecordBatch) -> None:
        for field in rows.schema:
            if field.name not in SCHEMA.names and pa.types.is_integer(field.type):
                totals = self._counted.setdefault(field.name, [0, 0])
                if total := pc.sum(rows.column(field.name)).as_py():
                    totals[0] += pc.sum(pc.greater(rows.column(field.name), 0)).as_py()
                    totals[1] += total


def totals_of(part: Mapping[str, Any]) -> Totals:
    """Documents and bytes of one part."""
    (kept, kept_bytes), (rejected, rejected_bytes) = (
        part["sides"][side].get("all", {}).get("all", [0, 0]) for side in ("kept", "rejected")
    )
    read = part["bytes_in"]
    return Totals(kept + rejected, kept, kept_bytes + rejected_bytes if read is None else read)


def stage_stats(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Headline metrics of a stage from the figures of its parts.

    `documents_in/out` and `bytes_in/out` (UTF-8 bytes of text); `by_source`, `by_split`, `by_language`, `by_license`,
    `by_domain` (the hundred largest) and `by_opt_out` (what authors object to) of what was kept, and `rejected_by_source`, …
    of what was not; `by_reason` of what was dropped (the reason without its figures); `scores`: for each score a histogram of
    a sample; `counted`: for each column of an edit's counts its `total`, and in how many `documents` it is not 0; and
    `examples`: a few texts kept, and dropped for each reason, those with the smallest ids.
    """
    counts: dict[str, dict[str, Counter[str]]] = {"kept": {}, "rejected": {}}
    sizes: dict[str, dict[str, Counter[str]]] = {"kept": {}, "rejected": {}}
    examples: dict[str, list[dict[str, Any]]] = {"kept": []}
    scores: dict[str, list[np.ndarray]] = {}
    counted: dict[str, list[int]] = {}
    read: list[int | None] = []
    for part in parts:
        read.append(part["bytes_in"])
        for side, columns in part["sides"].items():
            for column, values in columns.items():
                for value, (count, size) in values.items():
                    counts[side].setdefault(column, Counter())[value] += count
                    sizes[side].setdefault(column, Counter())[value] += size
        for name, rows in part["examples"].items():
            examples.setdefault(name, []).extend(rows)
        for column, values in part["scores"].items():
            scores.setdefault(column, []).append(_unpacked(values))
        for column, amounts in part["counted"].items():
            counted[column] = [one + other for one, other in zip(counted.get(column, [0, 0]), amounts, strict=True)]

    def table(side: str, column: str) -> dict[str, dict[str, int]]:
        documents = counts[side].get(column, Counter())
        names = sorted(documents)
        if column == "domain":
            names = sorted(names, key=lambda name: -documents[name])[:_DOMAINS]
        return {name: {"documents": documents[name], "bytes": sizes[side][column][name]} for name in names}

    first = {
        name: sorted(rows, key=lambda row: row["id"])[:_EXAMPLES] for name, rows in sorted(examples.items()) if name != "kept"
    }
    total = {side: table(side, "all").get("all", {"documents": 0, "bytes": 0}) for side in counts}
    written = total["kept"]["bytes"] + total["rejected"]["bytes"]
    return {
        "documents_in": total["kept"]["documents"] + total["rejected"]["documents"],
        "documents_out": total["kept"]["documents"],
        "bytes_in": sum(size or 0 for size in read) if any(read) else written,
        "bytes_out": total["kept"]["bytes"],
        **{f"by_{column}": table("kept", column) for column in (*_COUNTED, "domain", _OPT_OUT)},
        **{f"rejected_by_{column}": table("rejected", column) for column in (*_COUNTED, "domain", _OPT_OUT)},
        "by_reason": table("rejected", "reason"),
        "scores": {
            column: _histogram(values)
            for column, samples in scores.items()
            if column not in counted and len(values := np.concatenate(samples))
        },
        "counted": {column: {"documents": documents, "total": total} for column, (documents, total) in counted.items()},
        "examples": {
            "kept": sorted(examples["kept"], key=lambda row: row["id"])[:_EXAMPLES],
            "dropped": {name.removeprefix("dropped:"): rows for name, rows in first.items()},
        },
    }


def _domains(urls: pa.Array) -> pa.Array:
    """The domain of each URL, null where there is none. Beginnings of URLs repeat, and each is looked at once."""
    if urls.null_count == len(urls):
        return urls
    beginnings = pc.struct_field(pc.extract_regex(urls, r"^(?P<beginning>[^/?#]*//[^/?#]*)"), [0]).dictionary_encode()
    domains = pa.array([domain_of(beginning) for beginning in beginnings.dictionary.to_pylist()], pa.string())
    return domains.take(beginnings.indices)


def domain_of(url: str) -> str | None:
    """The host of a URL without `www.`; None where there is none."""
    try:
        host = urlsplit(url).hostname
    except ValueError:
        return None
    return host.removeprefix("www.") if host else None


def _in_order_of_ids(kept: pa.RecordBatch, rejected: pa.RecordBatch) -> pa.RecordBatch:
    names = [field.name for field in kept.schema if field.name == "id" or field.name not in SCHEMA.names]
    both = pa.concat_batches([kept.select(names), rejected.select(names)])
    return both.take(pc.sort_indices(both.column("id")))


def _rules_of(reasons: pa.Array) -> pa.DictionaryArray:
    """The rule that each reason is counted under, each rule once in the dictionary."""
    different = reasons.dictionary_encode()
    rules = pa.array([rule_of(reason) for reason in different.dictionary.to_pylist()], pa.string())
    return rules.take(different.indices).dictionary_encode()


def _packed(values: np.ndarray) -> str:
    """Numbers as JSON holds them in little space, and without the work of spelling each."""
    return base64.b64encode(np.asarray(values, "<f8").tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f8")


def _histogram(array: np.ndarray) -> dict[str, Any]:
    """`counts` in bins of equal width from `low` to `high`, the 0.5th and the 99.5th percentile; and how many lie `below` and
    `above`, down to `least` and up to `most`."""
    low, high = (float(value) for value in np.quantile(array, [0.005, 0.995]))
    if low == high:
        high = low + 1.0
    counts, _ = np.histogram(array, bins=_BINS, range=(low, high))
    return {
        "low": low,
        "high": high,
        "counts": counts.tolist(),
        "below": int((array < low).sum()),
        "above": int((array > high).sum()),
        "least": float(array.min()),
        "most": float(array.max()),
    }


def _shortened(text: str) -> str:
    return text if len(text) <= _EXAMPLE_CHARACTERS else text[:_EXAMPLE_CHARACTERS].rstrip() + " …"


def folder_stats(documents: Path) -> dict[str, Any]:
    """The metrics that a stage would have: of a folder of documents and, where there is one, its twin `rejected`.
    Raises ArtefactError when the folder holds no documents."""
    twin = documents.parent / "rejected"
    rejected = {path.name: path for path in document_files(twin)} if documents.name != "rejected" and twin.is_dir() else {}
    figures = []
    for path in document_files(documents):
        stats = PartStats()
        if path.name in rejected:
            for batch in read_part(rejected[path.name]):
                stats.add(_without_reason(batch).slice(0, 0), batch)
        for batch in read_part(path):
            stats.add(_without_reason(batch))
        figures.append(stats.result())
    return stage_stats(figures)


def _without_reason(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.select([name for name in batch.schema.names if name != "reason"])
