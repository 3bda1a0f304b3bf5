"""Retrievers of other frameworks on an index: `langchain`, `llama_index`, `haystack`. Each module needs its framework.

All search as `bessemer search` does, and say of each passage where it stands.
"""

from __future__ import annotations

from pathlib import Path

from bessemer.retrieval.index import OpenIndex, open_index

#: An open index, or the folder of one.
IndexSource = OpenIndex | Path | str


def opened(index: IndexSource) -> OpenIndex:
    """An index that is open. Raises ArtefactError as `open_index`."""
    return index if isinstance(index, OpenIndex) else open_index(Path(index))
