"""Search of an index: by words, by meaning, and both fused, with headings that a language model writes for the query, if the
index has one for it; a reranker, if it has one, orders what was found; copies of a passage collapse; neighbours, or the
section, can be added.

Fusion (Bruch et al. 2023): a passage's cosine, 0 for the farthest and 1 for the nearest that was found, plus its score by BM25
as a share of the best one, times a weight. The weight is small, as the search by words is the weaker one for questions in words
of one's own, and large for a query that holds a name or a number, which are found by words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np

from bessemer.core.errors import RequestError
from bessemer.retrieval.index import OpenIndex
from bessemer.retrieval.rerank import Reranker
from bessemer.retrieval.sections import joined, with_neighbours, with_section
from bessemer.retrieval.store import EVERYTHING, Filter, Found, Passage

Mode = Literal["hybrid", "words", "meaning"]
#: Weight of the search by words, and for a query with a name or a number in it.
WORDS_WEIGHT, NAMES_WEIGHT = 0.3, 1.0
#: Weight of the similarity of a passage's headings with those that a language model wrote. Chosen on
#: `benchmarks/retrieval_development.json` with Qwen2.5-Coder-1.5B-Instruct.
HEADINGS_WEIGHT = 1.5
#: `json.loads`, `max_tokens`, `parseInt`, `“exact words”`, numbers.
_NAME = re.compile(r"\w[._]\w|\d|[a-z][A-Z]|[\"`“]\w")
#: Passages that each search returns: so many for each wanted one, and the fewest. Up to a fourth of the fewest, the first hits
#: are the same however many are wanted.
_CANDIDATES, _FEWEST = 4, 200
#: Passages that a reranker orders, at least, and where written headings have brought the right ones to the front: more found no
#: more among the first ten (`benchmarks/retrieval_development.json`, Qwen2.5-Coder-1.5B-Instruct).
RERANKED, RERANKED_WITH_HEADINGS = 50, 20
#: Passages that are looked at for each section that is wanted, since a section may hold several.
_SAME_SECTION = 4
#: Most characters of a query.
MOST_CHARACTERS = 20_000
#: From this Jaccard similarity of their runs of three words, two passages are copies.
_ALIKE = 0.85


@dataclass(frozen=True)
class Hit:
    """A passage of the result. score: of the fusion, or of the reranker; ranks, scores: of each search that found it, and of
    the reranker (`reranked`). found: of a hit whose passage is a whole section, the passages of it that were found, the best
    first."""

    passage: Passage
    score: float
    ranks: Mapping[str, int]
    scores: Mapping[str, float]
    found: tuple[Passage, ...] = field(default=(), kw_only=True)

    @property
    def narrowed(self) -> Self:
        """The hit without its section: what was found alone."""
        if len(self.found) < 2:
            return replace(self, passage=self.found[0], found=()) if self.found else self
        in_order = sorted(self.found, key=lambda passage: passage.number)
        return replace(self, passage=joined(in_order, self.found[0], self.passage.headings), found=())

    @property
    def explanation(self) -> str:
        """Why the passage has its rank, in a few words."""
        kinds = {"words": "BM25", "meaning": "cosine", "headings": "similarity", "reranked": "score"}
        return ", ".join(f"{name} rank {self.ranks[name]} ({kinds[name]} {self.scores[name]:.3f})" for name in self.ranks)

    @property
    def details(self) -> dict[str, Any]:
        """Where the passage stands, and its rank and score in each search: what is said of it beside its text."""
        passage = self.passage
        return {
            "document": passage.document,
            "title": passage.title,
            "headings": passage.headings,
            "start": passage.start,
            "end": passage.end,
            "page": passage.page,
            "box": passage.box,
            "table_header": passage.table_header,
            "url": passage.url,
            "source": passage.source,
            "found": [[one.start, one.end] for one in self.found],
            "ranks": dict(self.ranks),
            "scores": dict(self.scores),
        }


def search(
    index: OpenIndex,
    query: str,
    count: int = 5,
    *,
    mode: Mode = "hybrid",
    where: Filter = EVERYTHING,
    neighbours: int = 0,
    section: int = 0,
) -> list[Hit]:
    """The `count` passages that fit a query best, or fewer, the best first.

    mode: `hybrid` searches by words only where the index has no vectors. neighbours: this many passages before and after each
    hit, from its document, are added to its text. section: each hit is its section, of at most this many characters
    (`sections.with_section`), in place of neighbours; what is found in the same section is one hit. Raises RequestError for a
    query that is empty or too long, and for `meaning` where the index has no vectors; of a reranker, what it raises.
    """
    if not query.strip():
        raise RequestError("the query is empty")
    if len(query) > MOST_CHARACTERS:
        raise RequestError(f"the query has {len(query):,} characters, at most {MOST_CHARACTERS:,} are searched for")
    if mode == "meaning" and index.embedder is None:
        raise RequestError("this index has no vectors, so it is searched by words")
    fewest = RERANKED_WITH_HEADINGS if mode == "hybrid" and index.expander is not None else RERANKED
    several = _SAME_SECTION * count if section else count
    pool = several if index.reranker is None else max(several, fewest)
    wanted = max(_FEWEST, _CANDIDATES * pool)
    words = index.store.by_words(query, wanted, where) if mode != "meaning" else []
    meaning: list[Found] = []
    if mode != "words" and index.embedder is not None:
        meaning = index.store.by_meaning(index.embedder.embed([query], "query")[0], wanted, where)
    headings: list[Found] = []
    if mode == "hybrid" and index.expander is not None:
        headings = index.headings.find(index.expander.headings(query, index.headings.examples), where)
    hits = without_copies(fused(words, meaning, NAMES_WEIGHT if _NAME.search(query) else WORDS_WEIGHT, headings), pool)
    if index.reranker is not None:
        hits = reranked(index.reranker, query, hits)[:several]
    if section:
        return _sections(index, hits, count, section)
    if neighbours:
        return [replace(hit, passage=with_neighbours(index.store, hit.passage, neighbours)) for hit in hits]
    return hits


def fused(words: Sequence[Found], meaning: Sequence[Found], weight: float, headings: Sequence[Found] = ()) -> list[Hit]:
    """The passages of all searches as one list, the best first. weight: of the search by words; that by meaning has 1.
    headings: found by headings that were written for the query. A passage that a search did not find has 0 from it."""
    best = max((one.scores["words"] for one in words), default=0.0)
    cosines = [one.scores["meaning"] for one in meaning]
    lowest, range_ = min(cosines, default=0.0), max(cosines, default=0.0) - min(cosines, default=0.0)
    parts: dict[str, list[Found]] = {}
    for one in (*words, *meaning, *headings):
        parts.setdefault(one.passage.id, []).append(one)
    hits = []
    for own in parts.values():
        ranks = {name: rank for one in own for name, rank in one.ranks.items()}
        scores = {name: score for one in own for name, score in one.scores.items()}
        score = weight * scores.get("words", 0.0) / best if best else 0.0
        if "meaning" in scores:
            # where all are equally near, each is the nearest
            score += (scores["meaning"] - lowest) / range_ if range_ else 1.0
        score += HEADINGS_WEIGHT * scores.get("headings", 0.0)
        hits.append(Hit(own[0].passage, score, ranks, scores))
    return sorted(hits, key=lambda hit: (-hit.score, hit.passage.id))


def reranked(reranker: Reranker, query: str, hits: Sequence[Hit]) -> list[Hit]:
    """Hits in the order of a reranker's scores, or of the sum of their scores and its, weighted; equal ones stay in theirs."""
    scores_N = np.asarray(reranker.scores(query, [hit.passage.shown for hit in hits]), np.float32)
    totals_N = scores_N.astype(np.float64)
    if reranker.weight is not None:
        totals_N = np.array([hit.score for hit in hits]) + reranker.weight * totals_N
    ordered = []
    for rank, place in enumerate(np.argsort(-totals_N, kind="stable"), start=1):
        hit = hits[place]
        ranks, scores = {**hit.ranks, "reranked": rank}, {**hit.scores, "reranked": float(scores_N[place])}
        ordered.append(replace(hit, score=float(totals_N[place]), ranks=ranks, scores=scores))
    return ordered


def without_copies(hits: Sequence[Hit], count: int) -> list[Hit]:
    """The first hits that are no near copies of those before them."""
    kept: list[Hit] = []
    runs: list[frozenset[tuple[str, ...]]] = []
    for hit in hits:
        own = _runs(hit.passage.text)
        if any(len(own & other) >= _ALIKE * len(own | other) for other in runs):
            continue
        kept.append(hit)
        runs.append(own)
        if len(kept) == count:
            break
    return kept


def _runs(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


def _sections(index: OpenIndex, hits: Sequence[Hit], count: int, most: int) -> list[Hit]:
    """The first `count` sections in which hits stand, each in the place of its first."""
    kept: list[Hit] = []
    for hit in hits:
        passage = hit.passage
        holding = (number for number, one in enumerate(kept) if _holds(one.passage, passage))
        if (number := next(holding, None)) is not None:
            kept[number] = replace(kept[number], found=(*kept[number].found, passage))
        elif len(kept) < count:
            kept.append(replace(hit, passage=with_section(index.store, passage, most), found=(passage,)))
    return kept


def _holds(section: Passage, passage: Passage) -> bool:
    return section.document == passage.document and section.start <= passage.start and passage.end <= section.end
