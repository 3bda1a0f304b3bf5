"""Near duplicates: speed against datatrove, what is found among planted pairs, and cost and memory as the corpus grows.

    python benchmarks/deduplication.py minhash  # CPU-seconds and removed documents beside datatrove's four steps
    python benchmarks/deduplication.py planted  # recall and precision on pairs of similarity 0.5 to 1, beside datatrove's
    python benchmarks/deduplication.py scaling  # CPU-seconds from 10,000 to 1,000,000 generated documents (15 minutes)
    python benchmarks/deduplication.py memory   # peak memory of each method at 200 MB and 4 GB (an hour, 12 GB of disk)

`minhash`, with verification off: both begin with texts in memory and end with the list of documents that go; datatrove runs its
four steps as they are, through its own files, without readers and writers of documents. Ours go through files as well.
Libraries are loaded, the tokenizer and the compiled loops warm; compiling is stated apart. Every measurement is a process of
its own that may use one thread. Results: `data_minhash.json`, and `deduplication_PART.json` of the others.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import recording
from data_common import (
    REPEATS,
    alternated,
    beside,
    docstrings_of_packages,
    documentation,
    measured,
    read_texts,
    speed,
    write_texts,
)
from rounds import summaries, summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/data/deduplication", "src/bessemer/data/engine.py")

MEGABYTES = 12.0
SIZES = (10_000, 31_623, 100_000, 316_228, 1_000_000)
PAIRS = 2000
METHODS = ("exact", "near", "lines", "sentences", "substrings")
#: Of documents, by which CPU-seconds may grow.
LARGEST_EXPONENT = 1.1
QUIET = {"TQDM_DISABLE": "1"}
#: Similarities by which documents are counted, from so much up to the next.
BINS = {
    "below_half": 0.0,
    "from_half": 0.5,
    "from_70_percent": 0.7,
    "from_80_percent": 0.8,
    "from_90_percent": 0.9,
    "equal": 0.9999,
}


# --- from texts to the documents that go ------------------------------------------------------------------------------


def corpus_of(texts: list[str]) -> Any:
    """Texts in memory as a corpus; a text's id is its place in the list."""
    import pyarrow as pa

    from bessemer.data.deduplication.corpus import Corpus

    ids = [f"{number:032x}" for number in range(len(texts))]
    table = pa.table({"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string())})
    return Corpus.of(lambda columns: table.select(list(columns)).to_batches(max_chunksize=4096))


def ours(path: str, verify: str = "") -> dict[str, Any]:
    """CPU-seconds, of compiling too, and for every document that goes the one that stays."""
    from bessemer.data.deduplication.near import near_duplicates

    texts = read_texts(path)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.process_time()
        near_duplicates(corpus_of(["some words to compile it all with"] * 3), Path(scratch), verify=bool(verify))
        compiling = time.process_time() - start
        start = time.process_time()
        corpus = corpus_of(texts)
        found = near_duplicates(corpus, Path(scratch), verify=bool(verify))
        seconds = time.process_time() - start
    gone = {
        int(low): int(kept) for (_, low), (_, kept) in zip(found.duplicates.dropped, found.duplicates.survivors, strict=True)
    }
    return {"seconds": seconds, "compiling": compiling, "compared": found.compared, "gone": gone}


def datatrove(path: str) -> dict[str, Any]:
    """The same of datatrove: signatures, buckets, clusters, filter."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.utils.logging import logger

    logger.remove()
    texts = read_texts(path)
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        places = [f"{folder}/{name}" for name in ("signatures", "pairs", "clusters")]
        signature = MinhashDedupSignature(places[0])
        signature.word_tokenizer.word_tokenize("warm")
        start = time.process_time()
        signature.run(iter(documents))
        for bucket in range(14):
            MinhashDedupBuckets(places[0], places[1]).run(None, bucket, 14)
        MinhashDedupCluster(places[1], places[2]).run()
        kept = {int(document.id) for document in MinhashDedupFilter(places[2]).run(iter(documents))}
        seconds = time.process_time() - start
        MinhashDedupCluster(places[1], places[2] + "-named", save_cluster_id=True).run()
        named = np.fromfile(f"{places[2]}-named/000000.clusters", dtype="<u4").reshape(-1, 2).tolist()
    stays = {cluster: document for document, cluster in named if document in kept}
    return {"seconds": seconds, "gone": {document: stays[cluster] for document, cluster in named if document not in kept}}


# --- minhash ------------------------------------------------------------------------------------------------------


def minhash() -> Path:
    sources = ((documentation(), 0.6), (docstrings_of_packages(), 0.4))
    texts = [text for source, share in sources for text in first_megabytes(source, MEGABYTES * share)]
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.json"
        megabytes = write_texts(path, texts)

        def side(name: str, function: Any, *arguments: str) -> dict[str, float]:
            figures = measured(function, path, *arguments, **QUIET, NUMBA_CACHE_DIR=f"{folder}/compiled")
            found[name] = figures.pop("gone")
            return figures

        # nothing is compiled yet: the first process compiles all loops, the others load them
        first, *warm = (side("verified", ours, "verify") for _ in range(1 + REPEATS))
        mine, theirs = alternated(lambda: side("bessemer", ours), lambda: side("datatrove", datatrove))
    verified = summaries(warm)
    speeds = beside(speed(megabytes, mine["seconds"]), speed(megabytes, theirs["seconds"]), "datatrove")
    loaded = summary(one["compiling"] + one["seconds"] for one in warm)
    compiling = first["compiling"] + first["seconds"] - loaded["median"]
    figures = {
        "texts": len(texts),
        "megabytes": megabytes,
        "speed": speeds,
        "seconds": {"bessemer": mine["seconds"], "datatrove": theirs["seconds"], "verified": verified["seconds"]},
        "compiling_seconds": compiling,
        "verified": {"gone": len(found["verified"]), "compared": int(verified["compared"]["median"])},
        **compare(texts, found["bessemer"], found["datatrove"]),
    }
    print(f"{len(texts):,} texts, {megabytes:.1f} MB")
    print(f"{'':<28} {'bessemer':>10} {'datatrove':>10}")
    print(f"{'CPU-seconds':<28} {mine['seconds']['median']:>10.3f} {theirs['seconds']['median']:>10.3f}")
    print(f"{'MB per CPU-second':<28} {speeds['bessemer']['median']:>10.2f} {speeds['datatrove']['median']:>10.2f}")
    print(f"{'compiling, first time':<28} {compiling:>10.2f}")
    print(f"{'with verification':<28} {verified['seconds']['median']:>10.3f}", end="   ")
    print(f"{figures['verified']['gone']:,} go, {figures['verified']['compared']:,} compared")
    for name in ("gone", "in_both", "equal_verdicts", "alone"):
        print(f"{name:<28} {figures[name]}")
    return recording.save("data_minhash", figures, tables=minhash_tables(figures), peers=("datatrove", "spacy"))


def minhash_tables(figures: dict[str, Any]) -> dict[str, Any]:
    speeds, seconds, gone = figures["speed"], figures["seconds"], figures["gone"]
    rows = [
        ("Bessemer", speeds["bessemer"]["median"], seconds["bessemer"]["median"], gone["bessemer"]),
        (
            "Bessemer, with verification",
            figures["megabytes"] / seconds["verified"]["median"],
            seconds["verified"]["median"],
            figures["verified"]["gone"],
        ),
        ("datatrove", speeds["datatrove"]["median"], seconds["datatrove"]["median"], gone["datatrove"]),
    ]
    columns = [
        (f"{figures['texts']:,} texts, {figures['megabytes']:.0f} MB", ""),
        ("MB per CPU-second", ".3g"),
        ("CPU-seconds", ".2f"),
        ("documents that go", ",.0f"),
    ]
    return {"speed": recording.table(columns, rows)}


def first_megabytes(texts: Iterator[str], megabytes: float) -> Iterator[str]:
    size = 0
    for text in texts:
        size += len(text.encode())
        if size > megabytes * 1e6:
            return
        yield text


def compare(texts: list[str], mine: dict[str, str], theirs: dict[str, str]) -> dict[str, Any]:
    """How far two ways agree on which documents repeat another, and how alike those are on which they differ.

    gone: documents that go. in_both: documents in a cluster of both. equal_verdicts: share of all documents. alone: those in a
    cluster of one alone, by the similarity to what they go for, and of them those of one shingle. alike_in_other: of what goes
    for a text that is alike at 0.8 or more, the share that is in a cluster of the other as well.
    """
    from bessemer.data.deduplication.minhash import jaccard, shingle_sets
    from bessemer.data.text.texts import Texts

    names = ("bessemer", "datatrove")
    sides = [{int(gone): int(stays) for gone, stays in side.items()} for side in (mine, theirs)]
    members = [set(side) | set(side.values()) for side in sides]
    sets, offsets = shingle_sets(Texts.of(texts), np.arange(len(texts)), 5)
    alone_by_side: dict[str, Any] = {}
    for name, side, one, other in zip(names, sides, members, reversed(members), strict=True):
        alone = [(document, side[document]) for document in sorted(one - other) if document in side]
        pairs = np.array(alone, dtype=np.int64).reshape(-1, 2)
        similarity = jaccard(sets, offsets[:-1], np.diff(offsets), pairs[:, 0], pairs[:, 1])
        sizes = np.diff(offsets)[pairs].min(axis=1)
        alone_by_side[name] = {
            "documents": len(one - other),
            "by_similarity": dict(zip(BINS, np.histogram(similarity, [*BINS.values(), 1.01])[0].tolist(), strict=True)),
            "of_one_shingle": int((sizes == 1).sum()),
        }
    alike: list[set[int]] = []  # what goes for a document at 0.8 or more, where chance plays no large part
    for side in sides:
        pairs = np.array(list(side.items()), dtype=np.int64).reshape(-1, 2)
        similarity = jaccard(sets, offsets[:-1], np.diff(offsets), pairs[:, 0], pairs[:, 1])
        whole = np.diff(offsets)[pairs].min(axis=1) > 1
        alike.append({document for document, _ in pairs[(similarity >= 0.8) & whole].tolist()})
    in_other = [len(one & other) / max(len(one), 1) for one, other in zip(alike, reversed(members), strict=True)]
    return {
        "gone": dict(zip(names, map(len, sides), strict=True)),
        "in_both": len(members[0] & members[1]),
        "equal_verdicts": 1 - len(members[0] ^ members[1]) / len(texts),
        "alone": alone_by_side,
        "alike_in_other": dict(zip(names, in_other, strict=True)),
    }


# --- planted ------------------------------------------------------------------------------------------------------


def planted_texts() -> tuple[list[str], dict[int, float]]:
    """Strangers and pairs; by the place of a pair's second text the pair's exact similarity."""
    from bessemer.data.deduplication.minhash import jaccard, shingle_sets
    from bessemer.data.text.texts import Texts

    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(20_000)]
    texts = []
    for number in range(PAIRS):
        words = rng.choices(vocabulary, k=rng.randint(60, 400))
        changed = list(words)
        # each changed word breaks up to five shingles; every similarity from 0.5 to 1 comes about equally often
        for _ in range(round(len(words) * 0.072 * number / PAIRS)):
            changed[rng.randrange(len(words))] = rng.choice(vocabulary)
        texts += [" ".join(words), " ".join(changed)]
    sets, offsets = shingle_sets(Texts.of(texts), np.arange(len(texts)), 5)
    first = np.arange(0, len(texts), 2)
    similarity = jaccard(sets, offsets[:-1], np.diff(offsets), first, first + 1)
    texts += [" ".join(rng.choices(vocabulary, k=rng.randint(60, 400))) for _ in range(PAIRS)]
    return texts, dict(zip((first + 1).tolist(), similarity.tolist(), strict=True))


def planted() -> Path:
    texts, similar = planted_texts()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.json"
        write_texts(path, texts)
        sides = {
            "bessemer": measured(ours, path, "verify"),
            "unverified": measured(ours, path),
            "datatrove": measured(datatrove, path),
        }
    wanted = [number for number, similarity in similar.items() if similarity >= 0.85]
    print(f"{len(texts):,} texts, {PAIRS:,} pairs, of which {len(wanted):,} at or above 0.85")
    figures: dict[str, Any] = {"texts": len(texts), "pairs": PAIRS, "wanted": len(wanted)}
    for name, side in sides.items():
        pairs = {max(int(gone), stays) for gone, stays in side["gone"].items() if abs(int(gone) - stays) == 1}
        recall = float(np.mean([number in pairs for number in wanted]))
        true = sum(similar.get(number, 0.0) >= 0.8 for number in pairs)
        figures[name] = {"recall": recall, "precision": true / max(len(side["gone"]), 1)}
        print(f"{name:<12} recall at 0.85 and above {recall:.4f}   precision at 0.8 {figures[name]['precision']:.4f}")
    tables = planted_tables(figures)
    return recording.save("deduplication_planted", figures, tables=tables, peers=("datatrove", "spacy"))


def planted_tables(figures: dict[str, Any]) -> dict[str, Any]:
    names = {"bessemer": "Bessemer", "unverified": "Bessemer, without verification", "datatrove": "datatrove"}
    rows = [(label, figures[name]["recall"], figures[name]["precision"]) for name, label in names.items() if name in figures]
    columns = [
        (f"{figures['wanted']:,} pairs at or above 0.85 among {figures['texts']:,} texts", ""),
        ("recall", ".3f"),
        ("precision at 0.8", ".3f"),
    ]
    return {"found": recording.table(columns, rows)}


# --- scaling and memory -------------------------------------------------------------------------------------------


def generate(folder: Path, documents: int, words: int) -> float:
    """A folder of documents of about so many words; one in ten is a near copy of another. Returns its megabytes of text."""
    import pyarrow as pa

    from bessemer.data.corpus.reader import SCHEMA
    from bessemer.data.corpus.writer import DocumentWriter

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(2, 11, 50_000)], dtype=object)
    size = 0
    with closing(DocumentWriter(folder, SCHEMA)) as writer:
        for start in range(0, documents, 4096):
            rows = min(4096, documents - start)
            texts: list[str] = []
            for row in range(rows):
                if row % 10 == 9:
                    chosen = texts[int(rng.integers(row))].split(" ")
                    chosen[int(rng.integers(len(chosen)))] = "changed"
                else:  # frequencies as 1 / rank
                    length = int(rng.integers(words // 2, words * 3 // 2))
                    chosen = vocabulary[(len(vocabulary) ** rng.random(length)).astype(np.int64) - 1].tolist()
                texts.append(" ".join(chosen))
            size += sum(map(len, texts))
            ids = [f"{int.from_bytes(rng.bytes(16)):032x}" for _ in range(rows)]
            columns = dict.fromkeys(SCHEMA.names, [None] * rows) | {"id": ids, "text": texts, "text_hash": ids}
            columns |= {"source": ["generated"] * rows, "split": ["train"] * rows}
            writer.write(pa.table(columns, schema=SCHEMA))
    return size / 1e6


def run(folder: str, method: str) -> dict[str, float]:
    """CPU-seconds and peak memory of a method on a folder of documents, from files to verdicts."""
    import pyarrow as pa

    from bessemer.data.corpus.reader import iterate_documents
    from bessemer.data.deduplication import methods as exact
    from bessemer.data.deduplication import near, passages
    from bessemer.data.deduplication import passages as substrings
    from bessemer.data.deduplication.corpus import Corpus

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    methods = {
        "near": lambda corpus, scratch: len(near.near_duplicates(corpus, scratch).duplicates),
        "exact": lambda corpus, scratch: len(exact.exact_duplicates(corpus)),
        "lines": lambda corpus, scratch: passages.repeated_lines(corpus, scratch).spans,
        "sentences": lambda corpus, scratch: passages.repeated_sentences(corpus, scratch).spans,
        "substrings": lambda corpus, scratch: substrings.repeated_substrings(corpus, scratch).spans,
    }
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as scratch:
        start = time.process_time()
        found = methods[method](Corpus.of(partial(iterate_documents, Path(folder))), Path(scratch))
        seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux
    return {"seconds": seconds, "peak_mb": peak, "found": found}


def scaling() -> Path:
    sizes = []
    with tempfile.TemporaryDirectory() as name:
        for documents in SIZES:
            folder = Path(name) / str(documents)
            megabytes = generate(folder, documents, 100)
            measured(run, folder, "near")  # compiles, and warms the disk's cache
            figures = min((measured(run, folder, "near") for _ in range(2)), key=lambda figures: figures["seconds"])
            sizes.append({"documents": documents, "megabytes": megabytes, **figures})
            print(
                f"{documents:>9,} documents, {megabytes:>6.0f} MB: {figures['seconds']:>8.2f} CPU-seconds, "
                f"{figures['peak_mb']:>6.0f} MB at the peak, {figures['found']:,} go",
                flush=True,
            )
    documents, seconds = np.log([[size["documents"], size["seconds"]] for size in sizes]).T
    exponent = float(np.polyfit(documents, seconds, 1)[0])
    last = float((seconds[-1] - seconds[-2]) / (documents[-1] - documents[-2]))
    print(f"exponent {exponent:.3f} over all, {last:.3f} over the last step; at most {LARGEST_EXPONENT} is asked for")
    result = {"sizes": sizes, "exponent": exponent, "last_step": last, "asked": LARGEST_EXPONENT}
    return recording.save("deduplication_scaling", result, tables=scaling_tables(result))


def scaling_tables(figures: dict[str, Any]) -> dict[str, Any]:
    rows = [(size["documents"], size["megabytes"], size["seconds"]) for size in figures["sizes"]]
    return {"sizes": recording.table([("documents", ",.0f"), ("MB of text", ",.0f"), ("CPU-seconds", ".3g")], rows)}


def memory(*methods: str) -> Path | None:
    """With names of methods only those, and no result."""
    figures: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for documents in (100_000, 2_000_000):
            folder = Path(name) / str(documents)
            megabytes = generate(folder, documents, 335)
            for method in methods or METHODS:
                found = measured(run, folder, method)
                figures.setdefault(method, []).append({"documents": documents, "megabytes": megabytes, **found})
                print(
                    f"{method:<12} {documents:>9,} documents, {megabytes:>6.0f} MB: {found['peak_mb']:>6.0f} MB at the peak, "
                    f"{found['seconds']:>8.1f} CPU-seconds, {found['found']:,} found",
                    flush=True,
                )
    return None if methods else recording.save("deduplication_memory", figures, tables=memory_tables(figures))


def memory_tables(figures: dict[str, Any]) -> dict[str, Any]:
    rows = [
        (method, size["documents"], size["megabytes"], size["peak_mb"], size["seconds"])
        for method, sizes in figures.items()
        for size in sizes
    ]
    columns = [
        ("method", ""),
        ("documents", ",.0f"),
        ("MB of text", ",.0f"),
        ("MB of memory at the peak", ",.0f"),
        ("CPU-seconds", ",.0f"),
    ]
    return {"peaks": recording.table(columns, rows)}


PARTS = {"minhash": minhash, "planted": planted, "scaling": scaling, "memory": memory}


def main(arguments: list[str]) -> None:
    name, *options = arguments or ["minhash"]
    if name not in PARTS:
        raise SystemExit(f"no such part: {name}; there are {', '.join(PARTS)}")
    if name in ("minhash", "planted"):
        recording.needs("datatrove", "spacy", install="pip install '.[bench]'")
    print(PARTS[name](*options) or "some of the methods alone: no result")


if __name__ == "__main__":
    import deduplication  # so that the functions have a module's name in other processes

    deduplication.main(sys.argv[1:])
