"""A retriever for LangChain."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field, PrivateAttr

from bessemer.retrieval.frameworks import IndexSource, opened
from bessemer.retrieval.index import OpenIndex
from bessemer.retrieval.search import Mode, search
from bessemer.retrieval.store import EVERYTHING, Filter


class BessemerRetriever(BaseRetriever):
    """Finds passages of an index.

    index: an open index, or its folder. k: passages, which `invoke(query, k=3)` overrides. where: the documents that are
    searched, and on whose behalf. neighbours: passages before and after each hit that are added to it. section: each hit is its
    section, of up to this many characters.
    """

    index: Any
    k: int = Field(5, ge=1)
    mode: Mode = "hybrid"
    where: Filter = EVERYTHING
    neighbours: int = Field(0, ge=0)
    section: int = Field(0, ge=0)
    _open: OpenIndex = PrivateAttr()

    def __init__(self, index: IndexSource, **settings: Any) -> None:
        """Raises ArtefactError as `open_index`."""
        super().__init__(index=index, **settings)
        self._open = opened(index)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, **_: Any
    ) -> list[Document]:
        around = {"neighbours": self.neighbours, "section": self.section}
        hits = search(self._open, query, k or self.k, mode=self.mode, where=self.where, **around)
        return [
            Document(id=hit.passage.id, page_content=hit.passage.text, metadata={**hit.details, "score": hit.score})
            for hit in hits
        ]
