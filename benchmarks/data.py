"""Our data stages beside datatrove, on the same real text in one process tree.

    python benchmarks/data.py filters     # Gopher's, C4's and FineWeb's rules: megabytes per CPU-second, and equal verdicts
    python benchmarks/data.py minhash     # near duplicates
    python benchmarks/data.py refinery    # all of it, files in and files out

Every measurement is a process of its own that may use one thread; Bessemer and its peer alternate, and the medians count.
Results: `data_filters.json`, `data_minhash.json`, `data_refinery.json`.
"""

from __future__ import annotations

import importlib
import sys

import recording

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/data",)

#: What can be measured: the function `main` of the module `data_NAME.py` beside this file.
PARTS = ("filters", "minhash", "refinery")


def main(names: list[str]) -> None:
    unknown = set(names) - set(PARTS)
    if unknown:
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    recording.needs("datatrove", "spacy", install="pip install '.[bench]'")
    for name in names or PARTS:
        print(importlib.import_module(f"data_{name}").main())


if __name__ == "__main__":
    main(sys.argv[1:])
