"""A retriever for Haystack: a component that a pipeline can be saved with."""

from __future__ import annotations

from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

from bessemer.core.errors import ConfigError
from bessemer.retrieval.frameworks import IndexSource, opened
from bessemer.retrieval.search import Mode, search
from bessemer.retrieval.store import EVERYTHING, Filter


@component
class BessemerRetriever:
    """Finds passages of an index, as documents with the score of the fusion."""

    def __init__(
        self,
        index: IndexSource,
        top_k: int = 5,
        mode: Mode = "hybrid",
        where: Filter = EVERYTHING,
        neighbours: int = 0,
        section: int = 0,
    ) -> None:
        """index: an open index, or its folder. where: the documents that are searched, and on whose behalf. neighbours:
        passages before and after each hit that are added to it. section: each hit is its section, of up to this many
        characters. Raises ArtefactError as `open_index`."""
        self._index = opened(index)
        self._settings: dict[str, Any] = {"top_k": top_k, "mode": mode, "neighbours": neighbours, "section": section}
        self._where = where

    @component.output_types(documents=list[Document])
    def run(self, query: str, top_k: int | None = None) -> dict[str, list[Document]]:
        """The passages of a query, the best first. top_k: in place of the component's own."""
        own = self._settings
        count = own["top_k"] if top_k is None else top_k
        around = {name: own[name] for name in ("neighbours", "section")}
        hits = search(self._index, query, count, mode=own["mode"], where=self._where, **around)
        documents = [Document(id=hit.passage.id, content=hit.passage.text, meta=hit.details, score=hit.score) for hit in hits]
        return {"documents": documents}

    def to_dict(self) -> dict[str, Any]:
        """The settings. Raises ConfigError for a component with a filter: a saved pipeline would search for anybody."""
        if self._where != EVERYTHING:
            raise ConfigError("a retriever with a filter is not saved; make it where the pipeline is made")
        return default_to_dict(self, index=str(self._index.folder), **self._settings)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BessemerRetriever:
        """A component of saved settings."""
        return default_from_dict(cls, data)  # type: ignore[no-any-return]
