"""Removed documents: the list of their ids in the store, which `collect` reads so that none is collected again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.errors import ArtefactError
from bessemer.core.store import write_text
from bessemer.data.corpus.lookup import is_document_id

#: The file in the store, one id a line. `bessemer forget` adds to it.
REMOVED_IDS = "forgotten.txt"


def removed_ids(store: Path) -> frozenset[str]:
    """The ids in a store's list; none where there is no list. Raises ArtefactError for a line that is no id: a
    damaged list must not let documents come back."""
    path = store / REMOVED_IDS
    if not path.exists():
        return frozenset()
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    for number, line in enumerate(lines, start=1):
        if line and not is_document_id(line):
            raise ArtefactError(f"{path}, line {number}: this is not the id of a document (32 hexadecimal digits)")
    return frozenset(line for line in lines if line)


def add_removed_ids(store: Path, ids: Iterable[str]) -> None:
    """Add ids to a store's list, which stays sorted."""
    store.mkdir(parents=True, exist_ok=True)
    known = removed_ids(store) | set(ids)
    write_text(store / REMOVED_IDS, "".join(f"{identity}\n" for identity in sorted(known)))


def without_removed(order: np.ndarray, ids: pa.ChunkedArray, removed: frozenset[str]) -> np.ndarray:
    """The numbers of rows in `order`, without those whose id was removed. Of the rows only the ids are read."""
    if not removed:
        return order
    gone = pc.is_in(ids, pa.array(sorted(removed), pa.string())).to_numpy()
    return order[~gone[order]]
