"""Contamination: how much of each item of a task stands in a training corpus, and the scores of items that do and do not.

By default as GPT-3's authors measured it: an item is dirty when it shares a run of 13 words with any document (Brown et al.
2020, appendix C). `ngram=8, least_share=0.7` is PaLM's rule, 70 % of an item's 8-grams (Chowdhery et al. 2022, section 8).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from bessemer.core.errors import ArtefactError
from bessemer.core.progress import Progress, Silent, Speed
from bessemer.core.report import Cell, Column, Table
from bessemer.core.statistics import Estimate, mean_estimate, score
from bessemer.core.store import follow
from bessemer.data.corpus.reader import TRAIN, count_documents, holds_documents, iterate_documents
from bessemer.evaluation.evaluation_folder import Score


@dataclass(frozen=True)
class TaskItem:
    """An item's own texts (question, passage, choices), without examples and templates."""

    task: str
    id: str
    texts: Sequence[str]


@dataclass(frozen=True)
class ItemOverlap:
    """How many of an item's distinct n-grams stand in the documents.

    ngrams: 0 for an item too short for one, of which nothing is known. dirty: the share reaches `least_share`.
    """

    task: str
    id: str
    ngrams: int
    shared: int
    dirty: bool

    @property
    def share(self) -> float:
        """Share of the n-grams that stand in the documents, 0 to 1."""
        return self.shared / self.ngrams if self.ngrams else 0.0


@dataclass(frozen=True)
class TaskContamination:
    """Numbers of a task's items that are clean, dirty, or too short to tell; their scores, None where no item has one.

    mean_share: mean of the items' `share`, over items that are not too short.
    """

    task: str
    clean: int
    dirty: int
    unknown: int
    mean_share: float
    score: Estimate | None = None
    clean_score: Estimate | None = None
    dirty_score: Estimate | None = None


def find_corpus(place: Path) -> Path:
    """The folder of documents that a folder is or holds: of a run its corpus. Raises ArtefactError when there is none."""
    for folder in (place, place / "documents", place / "corpus", place / "corpus" / "documents"):
        if holds_documents(follow(folder)):
            return follow(folder)
    raise ArtefactError(f"{place}: no documents to look for contamination in: name a run, a data stage's folder or documents")


def corpus_texts(documents: Path, progress: Progress | None = None) -> Iterator[pa.Array]:
    """The texts of the split `train` of a folder of documents, in batches."""
    speed = Speed()
    done, size = 0, 0
    with (progress or Silent()).task("contamination", total=count_documents(documents, TRAIN), unit="documents") as task:
        for batch in iterate_documents(documents, ["text"], split=TRAIN):
            yield batch.column("text")
            done += batch.num_rows
            size += batch.nbytes
            task.reach(done, speed.of(done, size))


def contamination(
    items: Iterable[TaskItem],
    documents: Iterable[pa.Array],
    *,
    ngram: int = 13,
    least_words: int = 8,
    least_share: float = 0.0,
) -> list[ItemOverlap]:
    """How much of each item the documents have, in the order of the items.

    documents: batches of texts, Arrow strings; seen once, one batch in memory at a time. An item's n-grams are those of all its
    texts, each counted once. A text of fewer than `ngram` but at least `least_words` words counts as one n-gram. An item is
    dirty when at least one is found, and a share of `least_share`.

    Raises ValueError for a `least_words` below 1 or above `ngram`, and a `least_share` outside 0 … 1.
    """
    if not 0 <= least_share <= 1:
        raise ValueError(f"least_share lies from 0 to 1, not {least_share}")
    # compiled by Numba, which a machine that evaluates without a corpus may lack
    from bessemer.data.deduplication.decontaminate import NgramOverlap
    from bessemer.data.text.texts import Texts

    items = list(items)
    texts = [(_encodable(text), index) for index, item in enumerate(items) for text in item.texts]
    overlap = NgramOverlap(
        Texts.of([text for text, _ in texts]), [index for _, index in texts], ngram=ngram, least_words=least_words
    )
    for batch in documents:
        overlap.add(Texts.from_arrow(batch))
    total, shared = overlap.counts()
    # items without any text at the end have no counts
    totals = [*total.tolist(), *[0] * (len(items) - len(total))]
    founds = [*shared.tolist(), *[0] * (len(items) - len(shared))]
    return [
        ItemOverlap(item.task, item.id, ngrams, here, here > 0 and here >= least_share * ngrams)
        for item, ngrams, here in zip(items, totals, founds, strict=True)
    ]


def _encodable(text: str) -> str:
    """The text with half surrogate pairs replaced, which JSON may spell and UTF-8 cannot hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def by_task(
    overlaps: Sequence[ItemOverlap], scores: Mapping[str, Mapping[str, Score]] | None = None
) -> list[TaskContamination]:
    """The contamination of each task; with scores by task and item, those of its clean and of its dirty items.

    An item that is too short to tell counts for neither. Items without a score count, and are in no mean.
    """
    results = []
    for task in dict.fromkeys(overlap.task for overlap in overlaps):
        of_task = [overlap for overlap in overlaps if overlap.task == task]
        known = [overlap for overlap in of_task if overlap.ngrams]
        clean, dirty = ([overlap for overlap in known if overlap.dirty == side] for side in (False, True))
        of_items = (scores or {}).get(task, {})
        results.append(
            TaskContamination(
                task,
                len(clean),
                len(dirty),
                len(of_task) - len(known),
                sum(overlap.share for overlap in known) / len(known) if known else 0.0,
                _score(of_task, of_items),
                _score(clean, of_items),
                _score(dirty, of_items),
            )
        )
    return results


def _score(overlaps: Sequence[ItemOverlap], scores: Mapping[str, Score]) -> Estimate | None:
    scored = [overlap.id for overlap in overlaps if overlap.id in scores]
    if not scored:
        return None
    clusters = [(name,) if scores[name].cluster is None else scores[name].cluster for name in scored]
    return mean_estimate([scores[name].score for name in scored], clusters)


def task_contamination(
    texts: Mapping[str, Mapping[str, Sequence[str]]],
    documents: Path,
    scores: Mapping[str, Mapping[str, Score]],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The contamination of tasks in a folder of documents, as plain values by task, for `results.json`.

    texts: of each task its items' texts (`Task.item_texts`); a task without any is left out. scores: by task and item.
    """
    items = [TaskItem(task, id, of_item) for task, of_task in texts.items() for id, of_item in of_task.items()]
    if not items:
        return {}
    results = by_task(contamination(items, corpus_texts(documents, progress)), scores)
    return {
        result.task: {
            "clean": result.clean,
            "dirty": result.dirty,
            "unknown": result.unknown,
            "mean_share": result.mean_share,
            "clean_accuracy": None if result.clean_score is None else result.clean_score.mean,
            "dirty_accuracy": None if result.dirty_score is None else result.dirty_score.mean,
        }
        for result in results
    }


def contamination_table(tasks: Sequence[TaskContamination]) -> Table:
    """A row a task: how many of its items stand in the corpus, and the scores with and without them."""
    rows: list[list[str | Cell]] = []
    for task in tasks:
        items = task.clean + task.dirty + task.unknown
        dirty = Cell(f"{task.dirty:,} of {items:,}", remark=f"{task.unknown:,} too short" if task.unknown else "")
        scores = [score(estimate) if estimate else "–" for estimate in (task.score, task.clean_score, task.dirty_score)]
        rows.append([task.task, dirty, f"{task.mean_share:.1%}", *scores])
    headings = ["In the corpus", "Share of n-grams", "Score", "of clean items", "of items in the corpus"]
    return Table([Column("Task"), *(Column(heading, True) for heading in headings)], rows)
