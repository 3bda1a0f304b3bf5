"""What an answer from sources says of them: the sources themselves, its citations as OpenAI's annotations, its sentences.

An annotation is of type `file_citation`, with `file_id`, `filename` and `index`, the place of `[n]` in the text in characters.
Further fields, which OpenAI's clients pass on: `number`, the source's; `quote`, the sentence of the source that is meant, with
its bytes in the document, `start` and `end`; `vector_store_id`; for a document with pages, `page` and `box`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.core.errors import RequestError
from bessemer.retrieval.citations import Citation, CitationReader, Entails, checked_statements
from bessemer.retrieval.search import Hit
from bessemer.retrieval.store import Passage


@dataclass(frozen=True)
class ServedHit(Hit):
    """A hit under the names by which clients know its store and its file.

    relevance: from 0 to 1. In an index with vectors the cosine, 0 where only the search by words found the passage; elsewhere
    61 / (60 + rank).
    """

    store: str
    file: str
    filename: str
    relevance: float


def page_of(passage: Passage) -> dict[str, Any]:
    """`page` and `box` of a passage of a document with pages; nothing for others."""
    # passages of documents without layout have neither
    values = {name: getattr(passage, name, None) for name in ("page", "box")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value is not None}


def source_body(number: int, hit: ServedHit) -> dict[str, Any]:
    """A source with its number, as a client reads it."""
    passage = hit.passage
    return {
        "number": number,
        "vector_store_id": hit.store,
        "file_id": hit.file,
        "filename": hit.filename,
        "title": passage.title,
        "headings": passage.headings,
        "url": passage.url,
        "text": passage.text,
        "start": passage.start,
        "end": passage.end,
        "score": hit.relevance,
        "explanation": hit.explanation,
        **page_of(passage),
    }


def search_result(hit: ServedHit, attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A hit as a search of a vector store returns it."""
    return {
        "file_id": hit.file,
        "filename": hit.filename,
        "score": hit.relevance,
        "attributes": attributes or {},
        "content": [{"type": "text", "text": hit.passage.text}],
        "headings": hit.passage.headings,
        "start": hit.passage.start,
        "end": hit.passage.end,
        **page_of(hit.passage),
    }


def call_result(hit: ServedHit) -> dict[str, Any]:
    """A hit among the results of a `file_search_call`."""
    return {"file_id": hit.file, "filename": hit.filename, "score": hit.relevance, "attributes": {}, "text": hit.passage.text}


class AnswerCitations:
    """The citations of one answer as it grows, and in the end its sentences."""

    def __init__(self, sources: Sequence[ServedHit], entails: Entails | None = None) -> None:
        """entails: judges whether sources bear out the sentences; None: by the share of common words."""
        self._sources = sources
        self._entails = entails
        self._reader = CitationReader(sources)
        #: All annotations so far.
        self.annotations: list[dict[str, Any]] = []

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The annotations of the citations that this text completes."""
        new = [self._annotation(citation) for citation in self._reader.feed(text)]
        self.annotations += new
        return new

    def statements(self) -> list[dict[str, Any]]:
        """The sentences of the answer: their citations, the share of their words that the sources have, and, where a head
        judges them, how likely these bear each out: as long as that takes. An answer with a sentence that its model's context
        does not hold is not judged so."""
        text = self._reader.text
        try:
            found = checked_statements(text, self._sources, self._entails)
        except RequestError:
            found = checked_statements(text, self._sources)
        return [
            {"text": one.text, "cited": list(one.cited), "support": one.support, "is_supported": one.is_supported}
            | ({} if one.entailment is None else {"entailment": one.entailment})
            for one in found
        ]

    def _annotation(self, citation: Citation) -> dict[str, Any]:
        hit = self._sources[citation.number - 1]
        return {
            "type": "file_citation",
            "index": citation.index,
            "file_id": hit.file,
            "filename": hit.filename,
            "number": citation.number,
            "quote": citation.quote,
            "start": citation.start,
            "end": citation.end,
            "vector_store_id": hit.store,
            **page_of(hit.passage),
        }
