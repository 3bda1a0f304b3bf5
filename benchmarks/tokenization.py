"""The speed and memory of tokenizers: training, encoding and shards, against Hugging Face `tokenizers` in one run.

    python benchmarks/tokenization.py [ROW ...]     # bpe_training encode_cold shards memory long_runs; all by default

The corpus is real text from the Python packages installed beside this one, half for training, half never seen. Every
measurement is a fresh process; Bessemer and its peer alternate, and the medians count. Takes about fifteen minutes on two
cores. Result, where all rows were asked for: `tokenization.json`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import recording
from bessemer.core.hashing import hash_bytes
from rounds import summaries, summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/tokenization",)

VOCAB_SIZE = 16_384
REPEATS = 3
TRAINING_MB, UNSEEN_MB, MEMORY_MB = 32, 24, 20
#: Characters of a document where memory is measured. Readers hold groups of 4,096 documents; of longer ones the small corpus
#: would not fill a group, and the two would differ by that. It is four copies of the same text, so that all else is filled too.
MEMORY_DOCUMENT = 1000
ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", "METADATA")
#: A file of tokens is filled in memory, up to this size: at the default 33 million tokens the small corpus would not fill it.
SHARD_TOKENS = 1 << 20


# --- the corpus ---------------------------------------------------------------------------------------------------


def package_texts() -> Iterator[tuple[str, str]]:
    """Path and text of the installed packages' source and documentation, in an order of its own, without copies."""
    root = Path(sysconfig.get_paths()["purelib"])
    files = [path for path in root.rglob("*") if path.name.endswith(ENDINGS) and 200 <= path.stat().st_size <= 1_000_000]
    seen = set()
    for path in sorted(files, key=lambda path: hash_bytes(b"order", path.relative_to(root).as_posix().encode())):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if hash(text) not in seen:
            seen.add(hash(text))
            yield path.relative_to(root).as_posix(), text


def write_corpora(folder: Path) -> dict[str, int]:
    """The documents folders `seen`, `unseen`, and of one part of `seen` 4 and 40 times over; the bytes of each."""
    taken: dict[str, list[str]] = {"seen": [], "unseen": []}
    sizes = {"seen": 0, "unseen": 0}
    limits = {"seen": TRAINING_MB * 10**6, "unseen": UNSEEN_MB * 10**6}
    for name, text in package_texts():
        # by package, so that the unseen half holds other words too
        half = "seen" if int(hash_bytes(b"half", name.split("/")[0].encode())[:4], 16) % 2 else "unseen"
        if sizes[half] < limits[half]:
            taken[half].append(text)
            sizes[half] += len(text.encode())
    some, size = [], 0
    for text in taken["seen"]:
        if size < MEMORY_MB * 10**6:
            some += [text[start : start + MEMORY_DOCUMENT] for start in range(0, len(text), MEMORY_DOCUMENT)]
            size += len(text.encode())
    for name, texts, copies in [
        ("seen", taken["seen"], 1),
        ("unseen", taken["unseen"], 1),
        ("once", some, 4),
        ("ten", some, 40),
    ]:
        documents_folder(folder / name, texts, copies)
    return {**sizes, "once": 4 * size, "ten": 40 * size}


def documents_folder(folder: Path, texts: list[str], copies: int) -> None:
    import pyarrow as pa

    from bessemer.data.corpus.reader import SCHEMA
    from bessemer.data.corpus.writer import write_documents

    def batches() -> Iterator[Any]:
        for copy in range(copies):
            for start in range(0, len(texts), 256):
                some = texts[start : start + 256]
                ids = [hash_bytes(b"document", f"{copy} {start + index}".encode()) for index in range(len(some))]
                columns: dict[str, list[Any]] = dict.fromkeys(SCHEMA.names, [None] * len(some))
                columns |= {"id": ids, "text_hash": ids, "text": some, "source": ["packages"] * len(some)}
                columns |= {"split": ["train"] * len(some)}
                yield pa.table(columns, schema=SCHEMA)

    write_documents(folder, batches())


def read_texts(documents: str) -> list[str]:
    from bessemer.data.corpus.reader import iterate_documents

    return [text for batch in iterate_documents(Path(documents), ["text"]) for text in batch.column("text").to_pylist()]


# --- what a fresh process measures --------------------------------------------------------------------------------


def train_ours(documents: str) -> dict[str, float]:
    """From texts to the parts of a complete tokenizer.json, merges included."""
    from bessemer.tokenization.algorithms import train_vocabulary
    from bessemer.tokenization.config import TokenizeConfig

    texts = read_texts(documents)
    config = TokenizeConfig(vocab_size=VOCAB_SIZE)
    start = time.perf_counter()
    train_vocabulary(texts, config.algorithm, config.learned_tokens)
    return {"seconds": time.perf_counter() - start}


def train_peer(documents: str) -> dict[str, float]:
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    from bessemer.tokenization.config import TokenizeConfig
    from bessemer.tokenization.split import SPLIT_REGEXES

    texts = read_texts(documents)
    config = TokenizeConfig(vocab_size=VOCAB_SIZE)
    start = time.perf_counter()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(tokenizers.Regex(SPLIT_REGEXES[config.split]), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=config.learned_tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return {"seconds": time.perf_counter() - start}


def encode_ours(folder: str, documents: str) -> dict[str, float]:
    from bessemer.tokenization.tokenizer import load_tokenizer

    texts = read_texts(documents)
    loading = time.perf_counter()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bulk.name == "fastokens"
    start = time.perf_counter()
    ids, _ = tokenizer.encode_flat(texts)
    return {"seconds": time.perf_counter() - start, "loading": start - loading, "tokens": len(ids), "sum": int(ids.sum())}


def encode_peer(folder: str, documents: str) -> dict[str, float]:
    import tokenizers

    texts = read_texts(documents)
    loading = time.perf_counter()
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    start = time.perf_counter()
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    seconds = time.perf_counter() - start
    ids = [encoding.ids for encoding in encoded]
    return {"seconds": seconds, "loading": start - loading, "tokens": sum(map(len, ids)), "sum": sum(map(sum, ids))}


def stage_ours(documents: str, out: str, folder: str = "") -> dict[str, float]:
    """The tokenize stage: with a tokenizer's folder it encodes and writes shards, without it trains besides."""
    from bessemer.core.progress import Silent
    from bessemer.tokenization.config import TokenizeConfig
    from bessemer.tokenization.stage import tokenize

    config = TokenizeConfig(vocab_size=VOCAB_SIZE, tokenizer=folder or None, training_bytes=10**12, shard_tokens=SHARD_TOKENS)
    start = time.perf_counter()
    result = tokenize(config, Path(documents), Path(out), seed=0, progress=Silent())
    return {
        "stage_seconds": time.perf_counter() - start,
        "seconds": result["encoding_seconds"],
        "tokens": result["train"]["tokens"],
        "peak_mb": peak_memory(),
    }


def shards_peer(documents: str, out: str, folder: str) -> dict[str, float]:
    """`tokenizers` and numpy: batches of documents to files of the same kind, without an index or hashes."""
    import numpy as np
    import tokenizers

    from bessemer.data.corpus.reader import iterate_documents

    tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    begin = tokenizer.token_to_id("<|endoftext|>")
    Path(out).mkdir()
    start = time.perf_counter()
    tokens, pieces, files = 0, [], 0
    for batch in iterate_documents(Path(documents), ["text"], split="train"):
        for encoding in tokenizer.encode_batch_fast(batch.column("text").to_pylist(), add_special_tokens=False):
            pieces.append(np.array([begin, *encoding.ids], np.uint16))
            tokens += len(pieces[-1])
        if sum(map(len, pieces)) >= SHARD_TOKENS:
            np.save(Path(out) / f"tokens-{files:05d}.npy", np.concatenate(pieces))
            pieces, files = [], files + 1
    np.save(Path(out) / f"tokens-{files:05d}.npy", np.concatenate([*pieces, np.array([begin], np.uint16)]))
    return {"seconds": time.perf_counter() - start, "tokens": tokens + 1}


LONG_RUNS = {"letter": "a", "space": " ", "digit": "1", "punctuation": "-", "line end": "\n", "CJK": "日", "emoji": "👍"}
SPACELESS = {"letters": "etaoinshrdlu", "base64": "ABCDEFGHabcdefghijklmnopqrstuvwxyz0123456789+/"}


def long_run(folder: str, kind: str, length: str) -> dict[str, float]:
    """Train on one text, and encode it: a repeated character, or random ones without a space."""
    import tokenizers

    from bessemer.tokenization.bpe import train_bpe
    from bessemer.tokenization.split import SPLIT_REGEXES
    from bessemer.tokenization.tokenizer import load_tokenizer

    if kind in LONG_RUNS:
        text = LONG_RUNS[kind] * int(length)
    else:
        some = "".join(random.Random(0).choices(SPACELESS[kind], k=1 << 20))
        text = (some * (int(length) // len(some) + 1))[: int(length)]
    result = {}
    start = time.perf_counter()
    train_bpe([text], 7, SPLIT_REGEXES["gpt-2"])
    result["train"] = time.perf_counter() - start
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bulk.name == "fastokens"
    start = time.perf_counter()
    bulk, _ = tokenizer.encode_flat([text])
    result["encode"] = time.perf_counter() - start
    result["peak_mb"] = peak_memory()
    if len(text) <= 1 << 20:  # the library, with the text in one: what the ids must be
        whole = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        start = time.perf_counter()
        ids = whole.encode(text, add_special_tokens=False).ids
        result["tokenizers"] = time.perf_counter() - start
        assert ids == bulk.tolist(), f"the ids of {kind} differ"
    return result


def peak_memory() -> float:
    """Largest resident size of this process in MB. Linux only; of getrusage's figure a part is the parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1000


# --- the rows -----------------------------------------------------------------------------------------------------


def measured(function: Any, *arguments: object) -> dict[str, float]:
    """What a function of this file returns in a fresh process, and the seconds of that process as a whole."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--measure", function.__name__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env={**os.environ, "TOKENIZERS_PARALLELISM": "true"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "process": time.perf_counter() - start}


def alternated(ours: Any, peer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Several measurements of each, taken in turn: of every figure the median, the rounds and their spread."""
    runs = [(ours(), peer()) for _ in range(REPEATS)]
    return summaries(run for run, _ in runs), summaries(run for _, run in runs)


def added(*figures: dict[str, Any]) -> dict[str, Any]:
    """The sums of several figures, round by round."""
    return summary(map(sum, zip(*(figure["rounds"] for figure in figures), strict=True)))


def row(name: str, unit: str, ours: dict[str, Any], peer: dict[str, Any] | None, megabytes: float) -> dict[str, Any]:
    """A row of seconds as it is shown: of `unit` MB/s as a speed. ratio: how many times as fast as the peer."""
    seconds = {"bessemer": ours} | ({} if peer is None else {"tokenizers": peer})
    ratio = None if peer is None else peer["median"] / ours["median"]
    shown = seconds
    if unit == "MB/s":
        shown = {side: summary(megabytes / taken for taken in found["rounds"]) for side, found in seconds.items()}
    medians = "".join(f"{found['median']:>10.2f} " for found in shown.values())
    print(f"{name:<46} {medians:<22} {'' if ratio is None else f'{ratio:8.2f}x'}  {unit}", flush=True)
    return {"unit": unit, "megabytes": megabytes, **shown, "ratio": ratio}


def bpe_training(work: Path, sizes: dict[str, int]) -> dict[str, Any]:
    ours, peer = alternated(lambda: measured(train_ours, work / "seen"), lambda: measured(train_peer, work / "seen"))
    return {"bpe_training": row("bpe_training", "s", ours["seconds"], peer["seconds"], sizes["seen"] / 1e6)}


def encode_cold(work: Path, sizes: dict[str, int]) -> dict[str, Any]:
    mb = sizes["unseen"] / 1e6
    arguments = (trained(work), work / "unseen")
    ours, peer = alternated(lambda: measured(encode_ours, *arguments), lambda: measured(encode_peer, *arguments))
    assert [ours[key]["rounds"] for key in ("tokens", "sum")] == [peer[key]["rounds"] for key in ("tokens", "sum")], (
        "the ids differ"
    )
    loading = [added(side["seconds"], side["loading"]) for side in (ours, peer)]
    return {
        "encode_cold": row("encode_cold", "MB/s", ours["seconds"], peer["seconds"], mb),
        "encode_cold_with_loading": row("encode_cold, with loading and checking", "s", *loading, mb),
        "encode_cold_process": row("encode_cold, whole process", "s", ours["process"], peer["process"], mb),
    }


def shards(work: Path, sizes: dict[str, int]) -> dict[str, Any]:
    mb = sizes["unseen"] / 1e6
    folder, documents, numbers = trained(work), work / "unseen", iter(range(100))
    ours, peer = alternated(
        lambda: measured(stage_ours, documents, work / f"shards{next(numbers)}", folder),
        lambda: measured(shards_peer, documents, work / f"shards{next(numbers)}", folder),
    )
    assert ours["tokens"]["rounds"] == peer["tokens"]["rounds"], "the shards differ"
    return {
        "shards": row("shards", "MB/s", ours["seconds"], peer["seconds"], mb),
        "shards_stage": row("shards, whole stage", "MB/s", ours["stage_seconds"], None, mb),
    }


def memory(work: Path, sizes: dict[str, int]) -> dict[str, Any]:
    numbers = iter(range(100))
    found = {}
    for name, folder in [("shards", (trained(work),)), ("training_and_shards", ())]:
        ten, once = alternated(
            lambda folder=folder: measured(stage_ours, work / "ten", work / f"memory{next(numbers)}", *folder),
            lambda folder=folder: measured(stage_ours, work / "once", work / f"memory{next(numbers)}", *folder),
        )
        ratio = ten["peak_mb"]["median"] / once["peak_mb"]["median"]
        peaks = {"once": once["peak_mb"], "ten_times": ten["peak_mb"], "ratio": ratio}
        print(
            f"memory, {name:<38} {once['peak_mb']['median']:>10.0f} {ten['peak_mb']['median']:>10.0f} {ratio:>8.2f}x  MB",
            flush=True,
        )
        found[name] = {"megabytes": {"once": sizes["once"] / 1e6, "ten_times": sizes["ten"] / 1e6}, "peak_mb": peaks}
    return {"memory": found}


def long_runs(work: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """Two lengths of our own side by side; and the library's time for the same text in one, where it is a million."""
    folder, found = trained(work), {}
    cases = [(kind, 1_000_000) for kind in LONG_RUNS] + [(kind, 50_000_000) for kind in SPACELESS]
    for kind, length in cases:
        half, whole = alternated(
            lambda kind=kind, length=length // 2: measured(long_run, folder, kind, length),
            lambda kind=kind, length=length: measured(long_run, folder, kind, length),
        )
        found[kind.replace(" ", "_")] = one = {"characters": length}
        for key in ("train", "encode"):
            ratio = whole[key]["median"] / half[key]["median"]
            one[key] = {"half": half[key], "whole": whole[key], "ratio": ratio}
            name = f"long_runs, {kind} x {length // 10**6}M, {key}"
            print(f"{name:<46} {half[key]['median']:>10.2f} {whole[key]['median']:>10.2f} {ratio:>8.2f}x  s", flush=True)
        one |= {key: whole[key] for key in ("peak_mb", "tokenizers") if key in whole}
    of_one = [found[kind.replace(" ", "_")]["encode"] for kind in LONG_RUNS]
    lengths = {length: bounds(one[length]["median"] for one in of_one) for length in ("half", "whole")}
    return {"long_runs": found, "one_character": lengths | {"ratio": bounds(one["ratio"] for one in of_one)}}


def trained(work: Path) -> Path:
    """The folder of a tokenizer trained on the seen texts, made at its first use."""
    out = work / "trained"
    if not out.exists():
        measured(stage_ours, work / "seen", out)
    return out / "tokenizer"


ROWS = {"bpe_training": bpe_training, "encode_cold": encode_cold, "shards": shards, "memory": memory, "long_runs": long_runs}
#: Of the table of speeds.
SPEEDS = {
    "bpe_training": "training, {megabytes:.0f} MB of code, vocabulary 16,384",
    "encode_cold": "encoding {megabytes:.0f} MB never seen",
    "encode_cold_with_loading": "the same with loading and the check of fastokens",
    "encode_cold_process": "the same, the whole process with Python's start and imports",
    "shards": "shards: encode and write (`tokenizers` with numpy)",
    "shards_stage": "shards: the whole stage, with its measurements and the report's figures",
}


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    """Speeds; peaks of memory; and what texts without a space take, of one length and of half of it."""
    speeds = [
        (
            f"{label.format(**figures[name])}, {figures[name]['unit']}",
            figures[name]["bessemer"]["median"],
            figures[name].get("tokenizers", {}).get("median"),
            figures[name]["ratio"],
        )
        for name, label in SPEEDS.items()
    ]
    peaks = [
        (
            name.replace("_", " "),
            *(found["peak_mb"][size]["median"] for size in ("once", "ten_times")),
            found["peak_mb"]["ratio"],
        )
        for name, found in figures["memory"].items()
    ]
    sizes = next(iter(figures["memory"].values()))["megabytes"]
    long = []
    for kind in SPACELESS:
        run = figures["long_runs"][kind]["encode"]
        long.append((f"50 MB of {kind} without a space", run["half"]["median"], run["whole"]["median"], run["ratio"]))
    one = figures["one_character"]
    long.append((f"a million of one character, any of {len(LONG_RUNS)} kinds", one["half"], one["whole"], one["ratio"]))
    return {
        "speed": recording.table([("", ""), ("Bessemer", ".3g"), ("`tokenizers`", ".3g"), ("", ".3g~×")], speeds),
        "memory": recording.table(
            [
                ("MB of memory at the peak", ""),
                (f"{sizes['once']:.0f} MB of text", ",.0f"),
                (f"{sizes['ten_times']:.0f} MB", ",.0f"),
                ("", ".2f~×"),
            ],
            peaks,
        ),
        "long_runs": recording.table(
            [("seconds of encoding", ""), ("half of it", ".2g"), ("all of it", ".2g"), ("", ".2f~×")], long
        ),
    }


def bounds(values: Iterable[float]) -> list[float]:
    """The smallest and the largest."""
    found = list(values)
    return [min(found), max(found)]


def main(names: list[str]) -> None:
    unknown = set(names) - ROWS.keys()
    if unknown:
        raise SystemExit(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if not Path("/proc/self/status").exists():
        recording.not_run("peak memory is read where Linux tells it, in /proc/self/status")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sizes = write_corpora(work)
        print("corpora in MB:", {name: round(size / 1e6, 1) for name, size in sizes.items()}, flush=True)
        print(f"{'':<46} {'bessemer':>10} {'peer':>10} {'ratio':>9}", flush=True)
        figures: dict[str, Any] = {}
        for name in names or ROWS:
            figures |= ROWS[name](work, sizes)
    if names:
        print("some of the rows alone: no result")
    else:
        print(recording.save("tokenization", figures, tables=tables(figures), peers=("tokenizers", "fastokens", "rustbpe")))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(globals()[sys.argv[2]](*sys.argv[3:])))
    else:
        main(sys.argv[1:])
