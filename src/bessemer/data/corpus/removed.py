"""Documents that were taken out for good: a list beside the artefacts, which collecting honours so that none comes back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.errors import ArtefactError
from bessemer.core.store import write_text
from bessemer.data.corpus.lookup import is_document_id

#: One id a line, in the store.
FORGOTTEN = "forgotten.txt"


def forgotten_ids(store: Path) -> frozenset[str]:
    """The ids in a store's list; none where there is no list. Raises ArtefactError for a line that is no id: a list that is
    damaged must not let documents come back."""
    path = store / FORGOTTEN
    if not path.exists():
        return frozenset()
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    for number, line in enumerate(lines, start=1):
        if line and not is_document_id(line):
            raise ArtefactError(f"{path}, line {number}: this is not the id of a document (32 hexadecimal digits)")
    return frozenset(line for line in lines if line)


def remember_forgotten(store: Path, ids: Iterable[str]) -> None:
    """Add ids to a store's list, which stays sorted."""
    store.mkdir(parents=True, exist_ok=True)
    known = forgotten_ids(store) | set(ids)
    write_text(store / FORGOTTEN, "".join(f"{identity}\n" for identity in sorted(known)))


def without_forgotten(order: np.ndarray, ids: pa.ChunkedArray, forgotten: frozenset[str]) -> np.ndarray:
    """The numbers of rows in `order`, without those whose id was forgotten. Of the rows only the ids are looked at."""
    if not forgotten:
        return order
    gone = pc.is_in(ids, pa.array(sorted(forgotten), pa.string())).to_numpy()
    return order[~gone[order]]
