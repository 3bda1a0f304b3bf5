"""Lookup of a document by its id, without reading the others' texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bessemer.core.object_storage import Place
from bessemer.data.corpus.reader import bucket_of, document_files, holds_documents, part_source

#: Where a stage leaves documents: those that go on, and those that it dropped.
SIDES = ("documents", "rejected")


def is_document_id(text: str) -> bool:
    """Whether a text has the form of an id: 32 hexadecimal digits."""
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def part_of(folder: Path, identity: str) -> Place:
    """The part of a documents folder in which an id lies if it lies there. Raises ArtefactError when the folder is none."""
    files = document_files(folder)
    return files[int(bucket_of(pa.array([identity]), len(files))[0])]


def find_document(folder: Path, identity: str) -> dict[str, Any] | None:
    """A document's row; None when the folder does not hold it. Row groups that cannot hold it are not read."""
    with part_source(part_of(folder, identity)) as source:
        rows = pq.read_table(source, filters=[("id", "==", identity)])
    return rows.to_pylist()[0] if rows.num_rows else None


@dataclass(frozen=True)
class Sighting:
    """A document as a stage left it: on one of `SIDES`."""

    stage: str
    side: str
    row: dict[str, Any]


def history(stages: Iterable[tuple[str, Path]], identity: str) -> Iterator[Sighting]:
    """What became of a document in each of the data stages' folders that hold it. Other stages' folders are passed over."""
    for stage, folder in stages:
        for side in SIDES:
            if holds_documents(folder / side) and (row := find_document(folder / side, identity)) is not None:
                yield Sighting(stage, side, row)
