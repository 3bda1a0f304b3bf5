"""What a data stage did, told from the folders it wrote: counts, bytes, reasons and examples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from bessemer.data.documents import iterate_documents
from bessemer.data.selection import rule_of

_EXAMPLES = 4
_EXAMPLE_CHARACTERS = 600
_EXAMPLE_COLUMNS = ["id", "text", "source", "language"]


def describe(out: Path) -> dict[str, Any]:
    """Headline metrics of a stage that wrote `out/documents` and perhaps `out/rejected`.

    `documents_in/out` and `bytes_in/out` (UTF-8 bytes of text), `by_source` and `by_split` of what was kept, `by_reason`
    of what was dropped (the reason without its figures), and `examples`: a few texts kept, and dropped for each
    reason, those with the smallest ids.
    """
    kept = _Side(out / "documents", ["source", "split"])
    sides = [kept]
    metrics: dict[str, Any] = {}
    if (out / "rejected").exists():
        rejected = _Side(out / "rejected", ["reason"])
        sides.append(rejected)
        metrics["by_reason"] = _table(rejected, "reason")
    return {
        "documents_in": sum(side.documents for side in sides),
        "documents_out": kept.documents,
        "bytes_in": sum(side.bytes for side in sides),
        "bytes_out": kept.bytes,
        "by_source": _table(kept, "source"),
        "by_split": _table(kept, "split"),
        **metrics,
        "examples": {
            "kept": _examples(out / "documents", sorted(kept.smallest["split"].get("train", []))[:_EXAMPLES]),
            **(
                {
                    "dropped": {
                        reason: _examples(out / "rejected", ids) for reason, ids in sorted(rejected.smallest["reason"].items())
                    }
                }
                if len(sides) > 1
                else {}
            ),
        },
    }


class _Side:
    """Counts of one folder, by the values of some columns, and the smallest ids of each value."""

    def __init__(self, folder: Path, columns: list[str]) -> None:
        self.documents = self.bytes = 0
        self.counts: dict[str, Counter[str]] = {column: Counter() for column in columns}
        self.sizes: dict[str, Counter[str]] = {column: Counter() for column in columns}
        self.smallest: dict[str, dict[str, list[str]]] = {column: {} for column in columns}
        for batch in iterate_documents(folder, ["id", "text", *columns]):
            sizes = pc.binary_length(batch.column("text")).to_pylist()
            ids = batch.column("id").to_pylist()
            self.documents += batch.num_rows
            self.bytes += sum(sizes)
            for column in columns:
                values = batch.column(column).to_pylist()
                if column == "reason":
                    values = [rule_of(reason) for reason in values]
                for identity, size, value in zip(ids, sizes, values, strict=True):
                    self.counts[column][value] += 1
                    self.sizes[column][value] += size
                    smallest = self.smallest[column].setdefault(value, [])
                    if len(smallest) < _EXAMPLES or identity < smallest[-1]:
                        smallest.append(identity)
                        smallest.sort()
                        del smallest[_EXAMPLES:]


def _table(side: _Side, column: str) -> dict[str, dict[str, int]]:
    return {
        value: {"documents": count, "bytes": side.sizes[column][value]} for value, count in sorted(side.counts[column].items())
    }


def _examples(folder: Path, ids: list[str]) -> list[dict[str, Any]]:
    wanted = set(ids)
    columns = _EXAMPLE_COLUMNS + (["reason"] if folder.name == "rejected" else [])
    found = []
    for batch in iterate_documents(folder, columns):
        mask = pc.is_in(batch.column("id"), pc.cast(list(wanted), "string"))
        found += batch.filter(mask).to_pylist()
    return [row | {"text": _shortened(row["text"])} for row in sorted(found, key=lambda row: row["id"])]


def _shortened(text: str) -> str:
    return text if len(text) <= _EXAMPLE_CHARACTERS else text[:_EXAMPLE_CHARACTERS].rstrip() + " …"
