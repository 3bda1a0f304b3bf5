"""The whole refinery beside datatrove: JSON lines in, the documents that stay out, with what each does on the way.

Both read the same compressed JSON lines, drop lines as C4 does, mask addresses, apply Gopher's quality and repetition rules,
C4's and FineWeb's, remove near duplicates by MinHash (14 bands of 8), and write the documents that are left. datatrove runs
its own pipeline with its own readers and writers, one task after the other, as its examples do. Languages are left to neither:
datatrove would have to fetch its model. Ours measures every document by every rule and writes all scores and the rejected
documents, and finds phone numbers, cards, IBANs and keys besides; datatrove stops at the first rule that is broken.
"""

from __future__ import annotations

import gzip
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import recording
from data_common import alternated, beside, measured, speed, texts_by_kind

MEGABYTES = 40.0
QUIET = {"TQDM_DISABLE": "1", "DAFT_PROGRESS_BAR": "0"}


def ours(source: str, work: str) -> dict[str, float]:
    """CPU-seconds of all four stages, in this process; the compiled loops are on disk from a run before."""
    from bessemer.data.config import CleanConfig, CollectConfig, DeduplicateConfig, SelectConfig
    from bessemer.data.stages.clean import clean
    from bessemer.data.stages.collect import collect
    from bessemer.data.stages.deduplicate import deduplicate
    from bessemer.data.stages.select import select

    def stages(root: Path, paths: str) -> dict[str, Any]:
        folders = [root / name for name in ("collected", "cleaned", "unique", "selected")]
        for folder in folders:
            folder.mkdir(parents=True)
        sources = [{"source": "files", "paths": paths}]
        collect(CollectConfig.parse({"sources": sources, "validation_share": 0}), folders[0], cache=root)
        scores = ["gopher_repetition", "gopher_quality", "c4", "fineweb"]
        clean(CleanConfig.parse({"edit": ["c4_lines", "pii"], "score": scores}), folders[0] / "documents", folders[1])
        deduplicate(DeduplicateConfig.parse(["minhash"]), folders[1] / "documents", folders[2])
        settings = {"keep": ["gopher", "c4", "fineweb"], "languages": []}
        return select(SelectConfig.parse(settings), folders[2] / "documents", folders[3])

    with tempfile.TemporaryDirectory(dir=work) as scratch:
        warm = Path(scratch) / "warm.jsonl"
        some = ["The cat sat on the mat, and that was all that there is to be said of it. " * 4 + str(n) for n in range(40)]
        warm.write_text("".join(json.dumps({"text": text}) + "\n" for text in some), encoding="utf-8")
        try:
            stages(Path(scratch) / "warm", str(warm))
        except Exception as error:  # nothing of it is kept, and that is well
            assert "usable" in str(error), error
        start = time.process_time()
        metrics = stages(Path(scratch) / "out", source)
        seconds = time.process_time() - start
    return {
        "seconds": seconds,
        "kept": metrics["documents_out"],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def datatrove(source: str, work: str) -> dict[str, float]:
    """The same by datatrove's executor, one task."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup.minhash import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.logging import logger
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    logger.remove()
    load_word_tokenizer("eng").word_tokenize("warm")
    with tempfile.TemporaryDirectory(dir=work) as root:
        steps: list[list[Any]] = [
            [
                JsonlReader(str(Path(source).parent), glob_pattern=Path(source).name),
                C4QualityFilter(filter_no_terminal_punct=False),
                GopherRepetitionFilter(),
                GopherQualityFilter(),
                FineWebQualityFilter(),
                PIIFormatter(),
                JsonlWriter(f"{root}/filtered"),
            ],
            [JsonlReader(f"{root}/filtered"), MinhashDedupSignature(f"{root}/signatures")],
            [MinhashDedupBuckets(f"{root}/signatures", f"{root}/pairs")],
            [MinhashDedupCluster(f"{root}/pairs", f"{root}/clusters")],
            [JsonlReader(f"{root}/filtered"), MinhashDedupFilter(f"{root}/clusters"), JsonlWriter(f"{root}/out")],
        ]
        start = time.process_time()
        for number, step in enumerate(steps):
            tasks = 14 if number == 2 else 1
            executor = LocalPipelineExecutor(step, tasks=tasks, logging_dir=f"{root}/logs/{number}")
            for rank in range(tasks):  # in this process: its CPU time is what is counted
                executor._run_for_rank(rank)
        seconds = time.process_time() - start
        kept = sum(gzip.decompress(path.read_bytes()).count(b"\n") for path in Path(root, "out").glob("*.gz"))
    return {"seconds": seconds, "kept": kept, "peak": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> Path:
    with tempfile.TemporaryDirectory() as work:
        kinds = texts_by_kind(MEGABYTES)
        texts = [text for group in kinds.values() for text in group]
        source = Path(work) / "texts.jsonl.gz"
        with gzip.open(source, "wt", encoding="utf-8") as stream:
            for number, text in enumerate(texts):
                stream.write(json.dumps({"id": str(number), "text": text}) + "\n")
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        by_kind = {kind: len(group) for kind, group in kinds.items()}
        print(f"{len(texts):,} texts, {megabytes:.1f} MB:", by_kind, flush=True)
        measured(ours, source, work, **QUIET)  # compiles
        mine, theirs = alternated(
            lambda: measured(ours, source, work, **QUIET), lambda: measured(datatrove, source, work, **QUIET)
        )
    print(f"{'':<24} {'bessemer':>10} {'datatrove':>10}")
    for name, key in (("CPU-seconds", "seconds"), ("documents kept", "kept"), ("peak memory, MB", "peak")):
        print(f"{name:<24} {mine[key]['median']:>10.2f} {theirs[key]['median']:>10.2f}")
    figures = {
        "texts": len(texts),
        "texts_by_kind": by_kind,
        "megabytes": megabytes,
        "speed": beside(speed(megabytes, mine["seconds"]), speed(megabytes, theirs["seconds"]), "datatrove"),
        "kept": {"bessemer": mine["kept"]["median"], "datatrove": theirs["kept"]["median"]},
        "peak_mb": {"bessemer": mine["peak"]["median"], "datatrove": theirs["peak"]["median"]},
    }
    return recording.save("data_refinery", figures, tables=tables(figures), peers=("datatrove", "spacy"))


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    speeds = figures["speed"]
    row = ("all stages, files in and files out", speeds["bessemer"]["median"], speeds["datatrove"]["median"], speeds["ratio"])
    columns = [
        (f"{figures['megabytes']:.1f} MB, MB per CPU-second", ""),
        ("Bessemer", ".1f"),
        ("datatrove", ".2f"),
        ("", ".1f~ ×"),
    ]
    return {"speed": recording.table(columns, [row])}
