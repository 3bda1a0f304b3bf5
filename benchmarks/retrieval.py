"""How often retrieval finds the right passage: the written questions on the standard library's documentation.

    python benchmarks/retrieval.py [--index FOLDER] [--rerank MODEL] [--expand NAME=MODEL]   # minutes on two cores
    python benchmarks/retrieval.py --index FOLDER --times [--rerank MODEL] [--expand NAME=MODEL]   # a quiet minute or two
    python benchmarks/retrieval.py --index FOLDER --development         # the other questions, and no result

The documentation of the interpreter's standard library is indexed as `bessemer index python_docs` does, and each question of
`retrieval_questions.json` is searched for by words, by meaning, by both, and, with `--rerank`, by both and then a reranker;
with `--expand`, which may be repeated, by both and by headings that a language model writes, and then reranked by the same
model. A question is found where a passage of one of its objects is among the first k (recall@k); MRR is the mean of 1 / rank
of the first such passage within ten; nDCG@10 counts every passage of these objects as right. Questions that no text there
answers (`near_misses`) are to be refused: the limit of what speaks for an answer (`answer.evidence`: the best passage's
cosine, with written headings also their similarity) is fitted on the calibration part and used on the test part. Ways of
searching are chosen on `retrieval_development.json`, whose objects are others.

With `--times` the same ways are timed on the first questions alone: of the processor, all threads together. Results:
`retrieval.json`, in which nothing is timed, so other work may run beside it, and `retrieval_times.json`.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import json
import math
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import recording
import rounds
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.core.hashing import hash_file, hash_value  # noqa: E402
from bessemer.core.progress import progress_for_terminal  # noqa: E402
from bessemer.core.store import write_json  # noqa: E402
from bessemer.data.sources.source import Tally  # noqa: E402
from bessemer.inference.engine import Engine  # noqa: E402
from bessemer.retrieval import expansion  # noqa: E402
from bessemer.retrieval.answer import calibrated_limit, evidence  # noqa: E402
from bessemer.retrieval.documents import documents_of, sources_of  # noqa: E402
from bessemer.retrieval.expansion import HeadingWriter  # noqa: E402
from bessemer.retrieval.index import OpenIndex, build_index, open_index  # noqa: E402
from bessemer.retrieval.measures import measured as measures_of  # noqa: E402
from bessemer.retrieval.rerank import HeadingReranker, open_reranker  # noqa: E402
from bessemer.retrieval.search import Mode, search  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/retrieval", "src/bessemer/model/encoder.py", "benchmarks/retrieval_questions.json")

QUESTIONS = Path(__file__).with_name("retrieval_questions.json")
DEVELOPMENT = Path(__file__).with_name("retrieval_development.json")
MODES: tuple[Mode, ...] = ("words", "meaning", "hybrid")
RANKS = (1, 5, 10, 20, 50)
NOT_INDEXED = "not indexed"
#: Questions by which a way of searching is timed, and most for which headings are written beside one another.
_TIMED, _BESIDE = 8, 32


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


def named(title: str) -> str:
    """The object that a passage documents: its heading without the kind and the parameters."""
    return re.split(r"[( ]", re.sub(r"^(class|module) ", "", title))[0]


def passages_by_name(index: OpenIndex) -> dict[str, set[str]]:
    """The passages of each object, by their identity."""
    passages: dict[str, set[str]] = {}
    for batch in index.store.batches(["id", "title"]):
        for identity, title in zip(batch["id"].to_pylist(), batch["title"].to_pylist(), strict=True):
            passages.setdefault(named(title), set()).add(identity)
    return passages


class Fresh:
    """An expander that writes headings each time, as a user's, with a reranker by the same model."""

    def __init__(self, model: Path) -> None:
        engine = Engine(model)
        self._writer, self.reranker = HeadingWriter(engine), HeadingReranker(engine)

    def headings(self, query: str, examples: Sequence[str]) -> list[str]:
        return self._writer.headings(query, examples)


class Remembered(Fresh):
    """An expander that writes headings for a question once, for most of them beside one another."""

    def __init__(self, model: Path, examples: Sequence[str], kept: Path | None) -> None:
        """kept: a file of headings that earlier runs wrote; those by this model, code and examples count."""
        super().__init__(model)
        self._examples = examples
        self._kept = kept
        self._key = hash_value([hash_file(model), hash_file(Path(expansion.__file__)), list(examples)])
        self._written = self._read().get(self._key, {})

    def _read(self) -> dict[str, dict[str, list[str]]]:
        return dict(json.loads(self._kept.read_text(encoding="utf-8"))) if self._kept and self._kept.exists() else {}

    def headings(self, query: str, examples: Sequence[str]) -> list[str]:
        if query not in self._written:
            self.write([query])
        return self._written[query]

    def write(self, queries: Sequence[str]) -> None:
        """Write headings for those queries that have none yet."""
        missing = [query for query in queries if query not in self._written]
        for first in range(0, len(missing), _BESIDE):
            some = missing[first : first + _BESIDE]
            self._written |= zip(some, self._writer.headings_of_each(some, self._examples), strict=True)
            print(f"headings for {first + len(some)} of {len(missing)} questions", flush=True)
            if self._kept is not None:
                write_json(self._kept, self._read() | {self._key: self._written})


def evidence_for(index: OpenIndex, question: str) -> float:
    """What speaks for an answer in the first hits; as large as there can be where nothing says."""
    found = evidence(search(index, question, 5))
    return math.inf if found is None else found


def judgements(index: OpenIndex, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The right passages of each question; of one whose objects have none in the index, a passage that nothing finds."""
    passages = passages_by_name(index)
    judged = []
    for row in rows:
        names = set().union(*map(names_of, row["passages"]))
        right = {identity: 1.0 for name in names for identity in passages.get(name, ())}
        judged.append(right or {NOT_INDEXED: 1.0})
    return judged


def found_by(index: OpenIndex, mode: Mode, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Recall, MRR and nDCG of a way of searching. rows: questions with the objects that answer them."""
    judged = judgements(index, rows)
    rankings = [[hit.passage.id for hit in search(index, row["question"], max(RANKS), mode=mode)] for row in rows]
    found = measures_of(rankings, judged)
    missed = [
        row["question"]
        for row, ranking, right in zip(rows, rankings, judged, strict=True)
        if not any(identity in right for identity in ranking[:5])
    ]
    return {
        **{f"recall_at_{k}": found.success[k] for k in RANKS},
        "mrr": found.mrr,
        "ndcg_at_10": found.ndcg,
        "missed": missed,
    }


def ways(index: OpenIndex, expanders: Mapping[str, Fresh]) -> dict[str, tuple[OpenIndex, Mode]]:
    """Each way of searching that an index has, and with each expander, by name: the index that searches so, and its mode."""
    plain = replace(index, reranker=None)
    found: dict[str, tuple[OpenIndex, Mode]] = {mode: (plain, mode) for mode in MODES}
    if index.reranker is not None:
        found["reranked"] = index, "hybrid"
    for name, expander in expanders.items():
        found[_key(name)] = replace(plain, expander=expander), "hybrid"
        found[_reranked(name)] = replace(plain, expander=expander, reranker=expander.reranker), "hybrid"
    return found


def milliseconds(index: OpenIndex, mode: Mode, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The processor's time for a search, in milliseconds: of the first questions one by one, after another for warmth."""
    search(index, rows[_TIMED]["question"], max(RANKS), mode=mode)
    spent = []
    for row in rows[:_TIMED]:
        start = time.process_time()
        search(index, row["question"], max(RANKS), mode=mode)
        spent.append(1000 * (time.process_time() - start))
    return rounds.summary(spent)


def every(part: Mapping[str, Any]) -> list[str]:
    """All questions of a part."""
    return [row["question"] for row in part["questions"]] + list(part["near_misses"])


def _key(name: str) -> str:
    return f"headings_{name}"


def _reranked(name: str) -> str:
    return f"headings_and_reranked_{name}"


def refusals(index: OpenIndex, parts: Mapping[str, Any]) -> dict[str, float]:
    """How often questions are refused by the limit of the evidence."""
    evidences = {
        part: {
            kind: [evidence_for(index, row["question"] if kind == "questions" else row) for row in parts[part][kind]]
            for kind in ("questions", "near_misses")
        }
        for part in ("test", "calibration")
    }
    limit = calibrated_limit(evidences["calibration"]["questions"], evidences["calibration"]["near_misses"])
    return {
        "limit": limit,
        "near_misses_refused": fmean(value < limit for value in evidences["test"]["near_misses"]),
        "questions_refused": fmean(value < limit for value in evidences["test"]["questions"]),
    }


def labels(expanders: Mapping[str, str]) -> dict[str, str]:
    """Each way of searching in words. expanders: name → the model, in words."""
    found = {way: way for way in (*MODES, "reranked")}
    for name, model in expanders.items():
        found[_key(name)] = f"hybrid and headings by {model}"
        found[_reranked(name)] = "the same, reranked by the same model"
    return found


def tables(figures: Mapping[str, Any], expanders: Mapping[str, str]) -> dict[str, Any]:
    """The ways of searching, and how often what is refused. expanders: as in `labels`."""
    columns = [("search", ""), *((f"recall@{k}", ".2f") for k in RANKS), ("MRR", ".2f"), ("nDCG@10", ".2f")]
    names = [*(f"recall_at_{k}" for k in RANKS), "mrr", "ndcg_at_10"]
    shown = {way: label for way, label in labels(expanders).items() if way in figures}
    searches = [(label, *(figures[way][name] for name in names)) for way, label in shown.items()]
    judged = {
        "refusals": "cosine",
        **{f"refusals_{name}": f"cosine and headings by {model}" for name, model in expanders.items()},
    }
    refused = [(label, figures[key]["near_misses_refused"], figures[key]["questions_refused"]) for key, label in judged.items()]
    kinds = [("by", ""), ("near misses refused", ".0%"), ("wrongly refused", ".0%")]
    return {"search": recording.table(columns, searches), "refusals": recording.table(kinds, refused)}


def save_times(index: OpenIndex, rows: Sequence[Mapping[str, Any]], models: Mapping[str, str]) -> Path:
    """Time each way of searching, and write the result."""
    measured = {
        way: milliseconds(*how, rows)
        for way, how in ways(index, {name: Fresh(Path(path)) for name, path in models.items()}).items()
    }
    shown = labels({name: Path(path).stem for name, path in models.items()})
    table = recording.table(
        [("search", ""), ("CPU ms", ".0f")],
        [(label, measured[way]["median"]) for way, label in shown.items() if way in measured],
    )
    return recording.save("retrieval_times", {"questions": _TIMED, **measured}, tables={"times": table})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, help="keep the index in this folder")
    parser.add_argument("--rerank", help="order what both searches found by this reranker, as bessemer search --rerank")
    parser.add_argument(
        "--expand", action="append", default=[], help="NAME=MODEL: search also for headings that this language model writes"
    )
    parser.add_argument("--written", type=Path, help="keep the headings in this file, and go on from those that are there")
    parser.add_argument(
        "--write-only", choices=("development", "calibration", "test"), help="write the headings for these questions, and end"
    )
    parser.add_argument("--development", action="store_true", help="the questions on which ways of searching are chosen")
    parser.add_argument("--times", action="store_true", help="time the ways of searching, and measure nothing else")
    arguments = parser.parse_args()
    recording.needs("lancedb")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.index or Path(scratch) / "index"
        start, tally, progress = time.process_time(), Tally(), progress_for_terminal()
        documents = documents_of(sources_of("python_docs"), Path(scratch), tally, progress)
        summary = build_index(documents, folder, progress=progress)
        seconds = time.process_time() - start
        models = dict(one.split("=", 1) for one in arguments.expand)
        index = open_index(folder, reranker=open_reranker(arguments.rerank) if arguments.rerank else None)
        development = json.loads(DEVELOPMENT.read_text(encoding="utf-8"))["questions"]
        parts = json.loads(QUESTIONS.read_text(encoding="utf-8"))
        if arguments.times:
            print(save_times(index, parts["test"]["questions"], models))
            return
        examples = index.headings.examples
        expanders = {name: Remembered(Path(path), examples, arguments.written) for name, path in models.items()}
        if arguments.write_only:
            asked = {name: every(parts[name]) for name in ("test", "calibration")}
            asked["development"] = [row["question"] for row in development]
            for expander in expanders.values():
                expander.write(asked[arguments.write_only])
            return
        if arguments.development:
            for expander in expanders.values():
                expander.write([row["question"] for row in development])
            for way, how in ways(index, expanders).items():
                found = found_by(*how, development)
                print(way, {name: value for name, value in found.items() if name != "missed"}, flush=True)
            return
        for expander in expanders.values():
            expander.write(every(parts["test"]) + every(parts["calibration"]))
        rows, plain = parts["test"]["questions"], replace(index, reranker=None)
        figures = {
            "documents": summary.documents,
            "passages": summary.passages,
            # of an index that was there already, nothing was embedded
            **({"index_cpu_seconds": seconds} if summary.added == summary.documents else {}),
            "questions": len(rows),
            "questions_without_passage": sum(NOT_INDEXED in right for right in judgements(index, rows)),
            **{way: found_by(*how, rows) for way, how in ways(index, expanders).items()},
            "refusals": refusals(plain, parts),
            **{f"refusals_{name}": refusals(replace(plain, expander=one), parts) for name, one in expanders.items()},
            **recording.when(),
        }
    print(
        recording.save("retrieval", figures, tables=tables(figures, {name: Path(path).stem for name, path in models.items()}))
    )


if __name__ == "__main__":
    main()
