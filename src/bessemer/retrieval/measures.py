"""How good a search is on queries whose right documents are known: success, recall, MRR and nDCG; and BEIR's files with such
queries (Thakur et al. 2021).

The definitions are those of `trec_eval`. A query's documents are judged by a number, 0 for a wrong one; documents without a
judgement count as wrong.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.retrieval.index import IndexedDocument

#: The ranks at which success and recall are counted.
CUTOFFS = (1, 5, 10, 20, 50)
#: The rank at which MRR and nDCG end.
_DEPTH = 10
#: Of a document's identity, its grade.
Judgements = Mapping[str, float]


@dataclass(frozen=True)
class SearchMeasures:
    """Means over queries.

    success: by rank k, the share of queries with a right document among the first k. recall: by rank k, the share of a query's
    right documents among the first k. mrr: 1 / rank of the first right document, 0 beyond rank 10. ndcg: discounted gain of the
    first ten over that of the best order (Järvelin and Kekäläinen 2002).
    """

    success: Mapping[int, float]
    recall: Mapping[int, float]
    mrr: float
    ndcg: float


def measured(rankings: Sequence[Sequence[str]], judged: Sequence[Judgements]) -> SearchMeasures:
    """Measures of queries. rankings: of each query the identities of what was found, the best first, each once. judged: of each
    query, of which at least one document is right. Raises ValueError for a query without one, and where there is no query."""
    if not judged or any(max(grades.values(), default=0) <= 0 for grades in judged):
        raise ValueError("each query needs a right document, and there must be a query")
    both = list(zip(rankings, judged, strict=True))
    return SearchMeasures(
        success={k: fmean(_right(ranking[:k], grades) > 0 for ranking, grades in both) for k in CUTOFFS},
        recall={k: fmean(_right(ranking[:k], grades) / _right(grades, grades) for ranking, grades in both) for k in CUTOFFS},
        mrr=fmean(_reciprocal_rank(ranking[:_DEPTH], grades) for ranking, grades in both),
        ndcg=fmean(_ndcg(ranking[:_DEPTH], grades) for ranking, grades in both),
    )


def _right(names: Iterable[str], grades: Judgements) -> int:
    return sum(grades.get(name, 0) > 0 for name in names)


def _reciprocal_rank(ranking: Sequence[str], grades: Judgements) -> float:
    return next((1 / rank for rank, name in enumerate(ranking, start=1) if grades.get(name, 0) > 0), 0.0)


def _ndcg(ranking: Sequence[str], grades: Judgements) -> float:
    best = sorted((grade for grade in grades.values() if grade > 0), reverse=True)[:_DEPTH]
    return _gain(max(0.0, grades.get(name, 0)) for name in ranking) / _gain(best)


def _gain(grades: Iterable[float]) -> float:
    return sum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades, start=1))


@dataclass(frozen=True)
class JudgedQuery:
    """A query with the grades of documents, by their identity."""

    query: str
    grades: Judgements


class BeirFolder:
    """A set of BEIR: `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv` in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def documents(self) -> Iterator[IndexedDocument]:
        """The documents to index; a document's place is its identity. Raises ArtefactError for a missing or damaged file."""
        for row in self._rows("corpus.jsonl"):
            yield IndexedDocument(row["_id"], row["text"], row["title"], source=self._folder.name)

    def queries(self, split: str = "test") -> list[JudgedQuery]:
        """The queries of a split that have a right document. Raises as `documents`."""
        texts = {row["_id"]: row["text"] for row in self._rows("queries.jsonl")}
        path = self._folder / "qrels" / f"{split}.tsv"
        grades: dict[str, dict[str, float]] = {}
        try:
            with path.open(encoding="utf-8", newline="") as lines:
                for row in csv.DictReader(lines, delimiter="\t"):
                    grades.setdefault(row["query-id"], {})[row["corpus-id"]] = float(row["score"])
            return [JudgedQuery(texts[name], own) for name, own in grades.items() if max(own.values()) > 0]
        except FileNotFoundError:
            raise ArtefactError(f"{path}: no such file; BEIR's judgements of the split {split} are expected there") from None
        except (KeyError, ValueError, TypeError) as error:
            raise ArtefactError(
                f"{path}: not BEIR's query-id, corpus-id and score, or a query that is not there: {error}"
            ) from None

    def _rows(self, name: str) -> Iterator[Mapping[str, str]]:
        path = self._folder / name
        try:
            with path.open(encoding="utf-8") as lines:
                for line in filter(str.strip, lines):
                    row: Any = json.loads(line)
                    yield {"_id": str(row["_id"]), "text": str(row["text"]), "title": str(row.get("title") or "")}
        except FileNotFoundError:
            raise ArtefactError(f"{path}: no such file; a folder of BEIR has corpus.jsonl, queries.jsonl and qrels") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(f"{path}: a line that is no JSON with _id and text: {error}") from None
