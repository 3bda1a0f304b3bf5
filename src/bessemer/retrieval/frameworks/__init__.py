"""Retrievers of other frameworks on an index: `langchain`, `llama_index`, `haystack`. Each module needs its framework.

All search as `bessemer search` does, and say of each passage where it stands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.retrieval.index import OpenIndex, open_index
from bessemer.retrieval.search import Hit

#: An open index, or the folder of one.
IndexSource = OpenIndex | Path | str


def opened(index: IndexSource) -> OpenIndex:
    """An index that is open. Raises ArtefactError as `open_index`."""
    return index if isinstance(index, OpenIndex) else open_index(Path(index))


def metadata_of(hit: Hit) -> dict[str, Any]:
    """What is said of a passage beside its text: its document, headings and bytes there, its rank and score in each search."""
    passage = hit.passage
    return {
        "document": passage.document,
        "title": passage.title,
        "headings": passage.headings,
        "url": passage.url,
        "source": passage.source,
        "start": passage.start,
        "end": passage.end,
        "ranks": dict(hit.ranks),
        "scores": dict(hit.scores),
    }
