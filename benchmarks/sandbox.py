"""What a program costs in the sandbox: `print(1)` from call to result, one at a time and many.

    python benchmarks/sandbox.py

In every tier that this machine offers. A figure is the median of the rounds, which the result keeps. Result: `sandbox.json`.
"""

from __future__ import annotations

import time
from typing import Any

import recording
from bessemer.core.sandbox import Program, Sandbox, SandboxError, Tier
from rounds import summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/core/sandbox",)

RUNS, MANY, ROUNDS = 60, 80, 5


def measured(tier: Tier) -> dict[str, Any]:
    """Milliseconds of a run, and programs a second of many: median, spread and rounds of each."""
    sandbox = Sandbox(minimum=tier, maximum=tier)
    milliseconds = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        assert sandbox.run("print(1)").stdout == "1\n"
        milliseconds.append(1e3 * (time.perf_counter() - begun))
    rates = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        results = sandbox.run_many([Program("print(1)")] * MANY)
        rates.append(MANY / (time.perf_counter() - begun))
        assert all(result.stdout == "1\n" for result in results)
    return {"milliseconds": summary(milliseconds), "programs_per_second": summary(rates)}


def main() -> None:
    figures = {}
    for tier in Tier:
        try:
            figures[tier.value] = measured(tier)
        except SandboxError as error:
            print(f"not run: {tier.value}: {error}")
    rows = [[tier, each["milliseconds"]["median"], each["programs_per_second"]["median"]] for tier, each in figures.items()]
    columns = [("`print(1)`", ""), ("ms, one at a time", ".0f"), ("programs/s, many", ".0f")]
    print(recording.save("sandbox", figures, tables={"start": recording.table(columns, rows)}))


if __name__ == "__main__":
    main()
