"""Peak memory of the whole refinery while the corpus grows: JSON lines in, collect, clean, deduplicate, select.

    python benchmarks/refinery_memory.py              # 200 MB and 4 GB of text
    python benchmarks/refinery_memory.py 200 1000     # other sizes, in MB

Documents are made of real sentences in new orders, so that they are as real ones are to filters, and differ. Each size is a
process of its own. Two figures by stage: the highest resident memory, pages of mapped files among it, which the system may
take back; and the highest of the process's own, sampled ten times a second. Result: `refinery_memory.json`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import recording
from data_common import docstrings_of_packages, documentation, measured, plays

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/data",)

SIZES, LIMIT = (200, 4000), 2048
MEGABYTES_OF_A_FILE = 100
QUIET = {"TQDM_DISABLE": "1", "DAFT_PROGRESS_BAR": "0"}


def generate(folder: Path, megabytes: int) -> None:
    """Files of JSON lines with about so many megabytes of text together."""
    some = random.Random(0)
    prose = [text for source in (plays(), documentation(), docstrings_of_packages()) for text in islice(source, 1500)]
    sentences = [f"{sentence.strip()}. " for text in prose for sentence in text.split(". ") if 30 < len(sentence) < 400]
    folder.mkdir()
    written, number = 0, 0
    while written < megabytes * 1e6:
        with (folder / f"texts-{number:03d}.jsonl").open("w", encoding="utf-8") as stream:
            while written < min(megabytes, (number + 1) * MEGABYTES_OF_A_FILE) * 1e6:
                text = "".join(some.choices(sentences, k=some.randint(5, 60)))
                written += len(text)
                stream.write(json.dumps({"id": f"{number}-{stream.tell()}", "text": text}) + "\n")
        number += 1


class _Peak:
    """Megabytes at most, since it was made: resident, and the process's own."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the system's own mark of the highest begins anew
        self._own, self._ends = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._ends.wait(0.1):
            self._own = max(self._own, _status("RssAnon"))

    def end(self) -> tuple[float, float]:
        self._ends.set()
        self._thread.join()
        return _status("VmHWM"), self._own


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def line(source: str, work: str) -> dict[str, Any]:
    """Peaks and CPU-seconds of the four stages, one after the other in this process."""
    from bessemer.data.config import CleanConfig, CollectConfig, DeduplicateConfig, SelectConfig
    from bessemer.data.stages.clean import clean
    from bessemer.data.stages.collect import collect
    from bessemer.data.stages.deduplicate import deduplicate
    from bessemer.data.stages.select import select

    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # not one core, as where speed is measured: threads cost memory
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        folders = [Path(scratch) / name for name in ("collected", "cleaned", "unique", "selected")]
        for folder in folders:
            folder.mkdir()
        documents = [folder / "documents" for folder in folders]
        scores = ["gopher_repetition", "gopher_quality", "c4", "fineweb"]
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "collect": lambda: collect(
                CollectConfig.parse([{"source": "files", "paths": source}]), folders[0], cache=Path(work)
            ),
            "clean": lambda: clean(CleanConfig.parse({"edit": ["c4_lines", "pii"], "score": scores}), documents[0], folders[1]),
            "deduplicate": lambda: deduplicate(DeduplicateConfig.parse(["exact", "minhash"]), documents[1], folders[2]),
            "select": lambda: select(SelectConfig.parse({"keep": "all", "languages": []}), documents[2], folders[3]),
        }
        found: dict[str, Any] = {}
        for name, step in steps.items():
            peak, start = _Peak(), time.process_time()
            metrics = step()
            resident, own = peak.end()
            found[name] = {"resident": resident, "own": own, "seconds": time.process_time() - start}
            print(name, found[name], file=sys.stderr, flush=True)
        return found | {"bytes": metrics["bytes_out"], "documents": metrics["documents_out"]}


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    rows = [
        (f"{size['megabytes']:,} MB", stage, found["resident"], found["own"], found["seconds"])
        for size in figures["sizes"]
        for stage, found in size["stages"].items()
    ]
    columns = [
        ("text", ""),
        ("stage", ""),
        ("MB resident at the peak", ",.0f"),
        ("its own", ",.0f"),
        ("CPU-seconds", ",.0f"),
    ]
    return {"peaks": recording.table(columns, rows)}


def main(arguments: list[str]) -> None:
    if not Path("/proc/self/clear_refs").exists():
        recording.not_run("peaks of memory are read where Linux tells them, in /proc/self")
    sizes = []
    for megabytes in [int(argument) for argument in arguments] or SIZES:
        with tempfile.TemporaryDirectory() as work:
            generate(Path(work) / "texts", megabytes)
            found = measured(line, Path(work) / "texts", work, **QUIET)
        left = {"documents_left": found.pop("documents"), "bytes_left": found.pop("bytes")}
        print(f"{megabytes:,} MB; {left['documents_left']:,} documents and {left['bytes_left'] / 1e6:,.0f} MB are left")
        for stage, figures in found.items():
            print(
                f"  {stage:<12} {figures['resident']:>6.0f} MB resident, {figures['own']:>6.0f} MB its own, "
                f"{figures['seconds']:>7.1f} CPU-seconds",
                flush=True,
            )
        sizes.append({"megabytes": megabytes, **left, "stages": found})
    result = {"sizes": sizes, "asked": LIMIT}
    print(recording.save("refinery_memory", result, tables=tables(result)))


if __name__ == "__main__":
    import refinery_memory  # so that the functions have a module's name in other processes

    refinery_memory.main(sys.argv[1:])
