"""What a program costs in the sandbox: `print(1)` from call to result, one at a time and many.

    python benchmarks/sandbox.py

In every tier that this machine offers. A figure is the median of the runs. Result: `sandbox.json`.
"""

from __future__ import annotations

import statistics
import time

import recording
from bessemer.core.sandbox import Program, Sandbox, SandboxError, Tier

RUNS, MANY = 60, 80


def measured(tier: Tier) -> dict[str, float]:
    """Milliseconds of a run, and programs a second of many."""
    sandbox = Sandbox(minimum=tier, maximum=tier)
    milliseconds = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        assert sandbox.run("print(1)").stdout == "1\n"
        milliseconds.append(1e3 * (time.perf_counter() - begun))
    begun = time.perf_counter()
    results = sandbox.run_many([Program("print(1)")] * MANY)
    seconds = time.perf_counter() - begun
    assert all(result.stdout == "1\n" for result in results)
    return {"milliseconds": statistics.median(milliseconds), "programs_per_second": MANY / seconds}


def main() -> None:
    figures = {}
    for tier in Tier:
        try:
            figures[tier.value] = measured(tier)
        except SandboxError as error:
            print(f"not run: {tier.value}: {error}")
    rows = [[tier, each["milliseconds"], each["programs_per_second"]] for tier, each in figures.items()]
    columns = [("`print(1)`", ""), ("ms, one at a time", ".0f"), ("programs/s, many", ".0f")]
    print(recording.save("sandbox", figures, tables={"start": recording.table(columns, rows)}))


if __name__ == "__main__":
    main()
