"""Requests for retrieval: the field `retrieval` of a chat, OpenAI's `file_search` tool, and bodies of vector stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from bessemer.serving.config import BATCHED, FILTERS, METADATA_VALUE, QUERIES, RESULTS, SEARCHED_STORES
from bessemer.serving.runtime.bodies import Body, Metadata, MetadataKey, MetadataText, Name, few_pairs, misfit

#: A value of an attribute.
Value = str | float | bool
#: Passages that an answer has as its sources, unless the request says how many.
SOURCES = 5


Attributes = Annotated[dict[MetadataKey, MetadataText | float | bool], BeforeValidator(few_pairs)]


class Comparison(Body):
    """A condition on one attribute of a file."""

    type: Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"]
    key: MetadataKey
    value: MetadataText | float | bool | Annotated[list[MetadataText | float], Field(max_length=FILTERS.most)]

    @model_validator(mode="after")
    def _has_its_kind_of_value(self) -> Self:
        if (self.type in ("in", "nin")) != isinstance(self.value, list):
            raise misfit(
                "value", f"a filter of type {self.type} {'takes' if self.type in ('in', 'nin') else 'is not of'} a list"
            )
        return self

    def holds(self, attributes: Mapping[str, Value]) -> bool:
        """Whether attributes fulfil it. A missing one is unequal to any value, and neither less nor greater."""
        own = attributes.get(self.key)
        match self.type, self.value:
            case "eq" | "ne", value:
                return (own == value and isinstance(own, bool) == isinstance(value, bool)) == (self.type == "eq")
            case "in" | "nin", list() as values:
                return (own in values and not isinstance(own, bool)) == (self.type == "in")
            case kind, str() as value if isinstance(own, str):
                return _in_order(kind, own, value)
            case kind, int() | float() as value if isinstance(own, int | float):
                return _in_order(kind, own, value)
        return False


def _in_order(kind: str, own: Any, value: Any) -> bool:
    return bool({"gt": own > value, "gte": own >= value, "lt": own < value, "lte": own <= value}[kind])


class InnerCompound(Body):
    """Several conditions inside another compound."""

    type: Literal["and", "or"]
    filters: list[Comparison] = Field(min_length=1, max_length=FILTERS.most)

    def holds(self, attributes: Mapping[str, Value]) -> bool:
        """Whether attributes fulfil all of them, or one."""
        return (all if self.type == "and" else any)(one.holds(attributes) for one in self.filters)


class Compound(Body):
    """Several conditions, of which each may be a compound of comparisons."""

    type: Literal["and", "or"]
    filters: list[Comparison | InnerCompound] = Field(min_length=1, max_length=FILTERS.most)

    def holds(self, attributes: Mapping[str, Value]) -> bool:
        """Whether attributes fulfil all of them, or one."""
        return (all if self.type == "and" else any)(one.holds(attributes) for one in self.filters)


AttributeFilter = Comparison | Compound


@dataclass(frozen=True)
class Wanted:
    """Passages that are asked for. stores: None: the server's own indexes. threshold: least cosine. section: as of `search`."""

    stores: Sequence[str] | None
    count: int
    filters: AttributeFilter | None = None
    threshold: float = 0.0
    mode: Literal["hybrid", "words", "meaning"] = "hybrid"
    section: int = 0


_Stores = Annotated[list[Name], Field(min_length=1, max_length=SEARCHED_STORES.most)]
_Count = Annotated[int, Field(ge=1, le=RESULTS.most)]
_Share = Annotated[float, Field(ge=0, le=1)]


class RetrievalRequest(Body):
    """The field `retrieval` of a chat: what the answer is drawn from. query: in place of the user's last message.
    section_characters: the sources are whole sections of up to this many characters; 0: passages."""

    vector_store_ids: _Stores | None = None
    query: str | None = None
    max_num_results: _Count = SOURCES
    filters: AttributeFilter | None = None
    score_threshold: _Share = 0.0
    mode: Literal["hybrid", "words", "meaning"] = "hybrid"
    section_characters: int = Field(0, ge=0, le=100_000)

    def wanted(self) -> Wanted:
        stores, count, section = self.vector_store_ids, self.max_num_results, self.section_characters
        return Wanted(stores, count, self.filters, self.score_threshold, self.mode, section)


class RankingOptions(Body):
    """How hits are ranked. All rankers are this server's own."""

    ranker: Literal["auto", "none", "default-2024-11-15"] = "auto"
    score_threshold: _Share = 0.0


_NO_OPTIONS = RankingOptions()


class FileSearchTool(Body):
    """OpenAI's `file_search`: this server searches for the user's last message before the model answers."""

    type: Literal["file_search"]
    vector_store_ids: _Stores
    max_num_results: _Count | None = None
    filters: AttributeFilter | None = None
    ranking_options: RankingOptions | None = None

    def wanted(self) -> Wanted:
        options = self.ranking_options or _NO_OPTIONS
        return Wanted(self.vector_store_ids, self.max_num_results or SOURCES, self.filters, options.score_threshold)


class SearchRequest(Body):
    """The body of a search of a vector store. rewrite_query: queries are searched for as they are."""

    query: str | Annotated[list[str], Field(min_length=1, max_length=QUERIES.most)]
    filters: AttributeFilter | None = None
    max_num_results: _Count = 10
    ranking_options: RankingOptions | None = None
    rewrite_query: Literal[False] = False

    @property
    def queries(self) -> list[str]:
        return [self.query] if isinstance(self.query, str) else self.query

    def wanted(self, store: str) -> Wanted:
        options = self.ranking_options or _NO_OPTIONS
        return Wanted([store], self.max_num_results, self.filters, options.score_threshold)


class Chunking(Body):
    """How files are cut: by structure, always."""

    type: Literal["auto"] = "auto"


class CreateStore(Body):
    """The body of a new vector store."""

    meaningful = frozenset({"metadata"})

    name: str = Field("", max_length=METADATA_VALUE.most)
    description: str = Field("", max_length=METADATA_VALUE.most)
    file_ids: list[Name] = Field(default_factory=list, max_length=BATCHED.most)
    metadata: Metadata = Field(default_factory=dict)
    chunking_strategy: Chunking = Chunking()


class ChangeStore(Body):
    """Another name or other metadata of a vector store."""

    meaningful = frozenset({"metadata"})

    name: str | None = Field(None, max_length=METADATA_VALUE.most)
    metadata: Metadata | None = None


class AddFile(Body):
    """A file for a vector store."""

    file_id: Name
    attributes: Attributes = Field(default_factory=dict)
    chunking_strategy: Chunking = Chunking()


class AddFiles(Body):
    """Several files for a vector store: either ids with the same attributes, or each with its own."""

    file_ids: list[Name] = Field(default_factory=list, max_length=BATCHED.most)
    files: list[AddFile] = Field(default_factory=list, max_length=BATCHED.most)
    attributes: Attributes = Field(default_factory=dict)
    chunking_strategy: Chunking = Chunking()

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if bool(self.file_ids) == bool(self.files):
            raise misfit("file_ids", "file_ids: give ids of files, or files, one of the two")
        return self

    @property
    def given(self) -> dict[str, Mapping[str, Value]]:
        """The attributes of each file, by its id."""
        alike: dict[str, Mapping[str, Value]] = dict.fromkeys(self.file_ids, self.attributes)
        return alike | {file.file_id: file.attributes for file in self.files}


class ChangeFile(Body):
    """Other attributes of a file in a vector store."""

    attributes: Attributes
