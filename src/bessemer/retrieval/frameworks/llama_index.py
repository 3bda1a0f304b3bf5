"""A retriever for LlamaIndex."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from bessemer.retrieval.frameworks import IndexSource, opened
from bessemer.retrieval.search import Hit, Mode, search
from bessemer.retrieval.store import EVERYTHING, Filter

#: What a language model reads beside a passage's text. An encoder reads nothing: vectors are in the index already.
_READ_BY_MODEL = ("title", "headings")


class BessemerRetriever(BaseRetriever):
    """Finds passages of an index, as nodes with the score of the fusion."""

    def __init__(
        self,
        index: IndexSource,
        *,
        similarity_top_k: int = 5,
        mode: Mode = "hybrid",
        where: Filter = EVERYTHING,
        neighbours: int = 0,
        section: int = 0,
        **settings: Any,
    ) -> None:
        """index: an open index, or its folder. where: the documents that are searched, and on whose behalf. neighbours:
        passages before and after each hit that are added to it. section: each hit is its section, of up to this many
        characters. settings: of LlamaIndex's base class. Raises ArtefactError as `open_index`."""
        super().__init__(**settings)
        self._index = opened(index)
        self._count = similarity_top_k
        self._mode = mode
        self._where = where
        self._around = {"neighbours": neighbours, "section": section}

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query = query_bundle.query_str
        hits = search(self._index, query, self._count, mode=self._mode, where=self._where, **self._around)
        return [NodeWithScore(node=_node(hit), score=hit.score) for hit in hits]


def _node(hit: Hit) -> TextNode:
    metadata = hit.details
    hidden = [name for name in metadata if name not in _READ_BY_MODEL]
    return TextNode(
        id_=hit.passage.id,
        text=hit.passage.text,
        metadata=metadata,
        excluded_llm_metadata_keys=hidden,
        excluded_embed_metadata_keys=list(metadata),
    )
