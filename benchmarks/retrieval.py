"""How often retrieval finds the right passage: the written questions on the standard library's documentation.

    python benchmarks/retrieval.py [--index FOLDER]    # some minutes on two cores, most of them vectors

The documentation of the interpreter's standard library is indexed as `bessemer index python_docs` does, and each question of
`retrieval_questions.json` is searched for by words, by meaning, and by both. A question is found where a passage of one of its
objects is among the first k (recall@k); MRR is the mean of 1 / rank of the first such passage within ten. Questions that no
text there answers (`near_misses`) are to be refused: the limit of the best passage's cosine is fitted on the calibration part
and used on the test part.

Result: `retrieval.json`.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.core.progress import progress_for_terminal  # noqa: E402
from bessemer.data.sources.source import Tally  # noqa: E402
from bessemer.retrieval.answer import calibrated_limit  # noqa: E402
from bessemer.retrieval.documents import documents_of, sources_of  # noqa: E402
from bessemer.retrieval.index import OpenIndex, build_index, open_index  # noqa: E402
from bessemer.retrieval.search import Hit, Mode, search  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/retrieval", "src/bessemer/model/encoder.py", "benchmarks/retrieval_questions.json")

QUESTIONS = Path(__file__).with_name("retrieval_questions.json")
MODES: tuple[Mode, ...] = ("words", "meaning", "hybrid")
RANKS = (1, 5, 10)


def names_of(passage: str) -> set[str]:
    """The names under which an object's documentation may stand: its own, and that of where it is defined."""
    steps = passage.split(".")
    for count in range(len(steps), -1, -1):
        try:
            found: Any = importlib.import_module(".".join(steps[:count])) if count else builtins
            for step in steps[count:]:
                found = getattr(found, step)
        except (ImportError, AttributeError, ValueError):
            continue
        module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", "")
        return {passage, passage.removeprefix("builtins."), f"{module}.{name}"}
    raise ValueError(f"{passage}: there is no such object")


def named(hit: Hit) -> str:
    """The object that a passage documents: its heading without the kind and the parameters."""
    return re.split(r"[( ]", re.sub(r"^(class|module) ", "", hit.passage.title))[0]


def rank_of(hits: Sequence[Hit], wanted: set[str]) -> int | None:
    """The rank of the first passage of a wanted object, from 1."""
    return next((rank for rank, hit in enumerate(hits, start=1) if named(hit) in wanted), None)


def best_cosine(index: OpenIndex, question: str) -> float:
    """Of the passage that is nearest to a question."""
    (hit,) = search(index, question, 1, mode="meaning")
    return hit.scores["meaning"]


def measured(index: OpenIndex) -> dict[str, Any]:
    """Recall, MRR and refusals."""
    parts = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    rows = [(row["question"], set().union(*map(names_of, row["passages"]))) for row in parts["test"]["questions"]]
    figures: dict[str, Any] = {"questions": len(rows)}
    for mode in MODES:
        start = time.perf_counter()
        ranks = [rank_of(search(index, question, max(RANKS), mode=mode), wanted) for question, wanted in rows]
        figures[mode] = {
            **{f"recall_at_{k}": fmean(rank is not None and rank <= k for rank in ranks) for k in RANKS},
            "mrr": fmean(0.0 if rank is None else 1 / rank for rank in ranks),
            "milliseconds": 1000 * (time.perf_counter() - start) / len(rows),
            "missed": [question for (question, _), rank in zip(rows, ranks, strict=True) if rank is None or rank > 5],
        }
    cosines = {
        part: {
            kind: [best_cosine(index, row["question"] if kind == "questions" else row) for row in parts[part][kind]]
            for kind in ("questions", "near_misses")
        }
        for part in ("test", "calibration")
    }
    limit = calibrated_limit(cosines["calibration"]["questions"], cosines["calibration"]["near_misses"])
    figures["refusals"] = {
        "limit": limit,
        "near_misses_refused": fmean(cosine < limit for cosine in cosines["test"]["near_misses"]),
        "questions_refused": fmean(cosine < limit for cosine in cosines["test"]["questions"]),
    }
    return figures


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    columns = [("search", ""), *((f"recall@{k}", ".2f") for k in RANKS), ("MRR", ".2f"), ("ms a query", ".0f")]
    names = [*(f"recall_at_{k}" for k in RANKS), "mrr", "milliseconds"]
    return {"search": recording.table(columns, [(mode, *(figures[mode][name] for name in names)) for mode in MODES])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, help="keep the index in this folder")
    arguments = parser.parse_args()
    recording.needs("lancedb")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.index or Path(scratch) / "index"
        start, tally, progress = time.perf_counter(), Tally(), progress_for_terminal()
        documents = documents_of(sources_of("python_docs"), Path(scratch), tally, progress)
        summary = build_index(documents, folder, progress=progress)
        seconds = time.perf_counter() - start
        index = open_index(folder)
        figures = {
            "documents": summary.documents,
            "passages": summary.passages,
            "index_seconds": seconds,
            **measured(index),
            **recording.when(),
        }
    print(recording.save("retrieval", figures, tables=tables(figures)))


if __name__ == "__main__":
    main()
