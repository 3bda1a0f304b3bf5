"""Search of an index: by words, by meaning, and both fused by rank; copies of a passage collapse, neighbours can be added.

Reciprocal-rank fusion (Cormack et al. 2009): a passage scores Σ 1 / (60 + rank) over the searches that found it. Ranks alone
count, since scores of BM25 and cosines have no common scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bessemer.core.errors import RequestError
from bessemer.retrieval.index import OpenIndex
from bessemer.retrieval.store import EVERYTHING, Filter, Found, Passage

Mode = Literal["hybrid", "words", "meaning"]
#: The constant of reciprocal-rank fusion.
RANK_CONSTANT = 60
#: Passages that each search returns: so many for each wanted one, and the fewest.
_CANDIDATES, _FEWEST = 4, 40
#: Most characters of a query.
MOST_CHARACTERS = 20_000
#: From this Jaccard similarity of their runs of three words, two passages are copies.
_ALIKE = 0.85


@dataclass(frozen=True)
class Hit:
    """A passage of the result. score: of the fusion; ranks, scores: of each search that found it."""

    passage: Passage
    score: float
    ranks: Mapping[str, int]
    scores: Mapping[str, float]

    @property
    def explanation(self) -> str:
        """Why the passage has its rank, in a few words."""
        kinds = {"words": "BM25", "meaning": "cosine"}
        return ", ".join(f"{name} rank {self.ranks[name]} ({kinds[name]} {self.scores[name]:.3f})" for name in self.ranks)


def search(
    index: OpenIndex, query: str, count: int = 5, *, mode: Mode = "hybrid", where: Filter = EVERYTHING, neighbours: int = 0
) -> list[Hit]:
    """The `count` passages that fit a query best, or fewer, the best first.

    mode: `hybrid` searches by words only where the index has no vectors. neighbours: this many passages before and after each
    hit, from its document, are added to its text. Raises RequestError for a query that is empty or too long, and for `meaning`
    where the index has no vectors.
    """
    if not query.strip():
        raise RequestError("the query is empty")
    if len(query) > MOST_CHARACTERS:
        raise RequestError(f"the query has {len(query):,} characters, at most {MOST_CHARACTERS:,} are searched for")
    if mode == "meaning" and index.embedder is None:
        raise RequestError("this index has no vectors, so it is searched by words")
    wanted = max(_FEWEST, _CANDIDATES * count)
    found: list[list[Found]] = []
    if mode != "meaning":
        found.append(index.store.by_words(query, wanted, where))
    if mode != "words" and index.embedder is not None:
        found.append(index.store.by_meaning(index.embedder.embed([query], "query")[0], wanted, where))
    hits = without_copies(fused(found), count)
    return [_widened(index, hit, neighbours) for hit in hits] if neighbours else hits


def fused(found: Iterable[Sequence[Found]]) -> list[Hit]:
    """The passages of several searches as one list, by reciprocal-rank fusion."""
    hits: dict[str, Hit] = {}
    for one in (each for of_search in found for each in of_search):
        score = sum(1 / (RANK_CONSTANT + rank) for rank in one.ranks.values())
        if (before := hits.get(one.passage.id)) is None:
            hits[one.passage.id] = Hit(one.passage, score, dict(one.ranks), dict(one.scores))
        else:
            hits[one.passage.id] = Hit(
                one.passage, before.score + score, {**before.ranks, **one.ranks}, {**before.scores, **one.scores}
            )
    return sorted(hits.values(), key=lambda hit: (-hit.score, hit.passage.id))


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


def _widened(index: OpenIndex, hit: Hit, neighbours: int) -> Hit:
    """A hit with the text of the passages around it in its document; text that two passages share stands once."""
    passage = hit.passage
    numbers = range(max(0, passage.number - neighbours), passage.number + neighbours + 1)
    around = index.store.of_document(passage.document, numbers)
    text, end = "", around[0].start
    for one in around:
        raw = one.text.encode()
        gap = "\n\n" if text and one.start > end else ""
        text += gap + raw[max(0, end - one.start) :].decode(errors="ignore") if text else one.text
        end = max(end, one.end)
    wide = replace(passage, text=text, start=around[0].start, end=end, table_header=around[0].table_header)
    return replace(hit, passage=wide)
