"""Peak FLOP/s for MFU: vendor figure on a GPU, measured matmul on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from bessemer.core.store import read_json, write_json
from bessemer.training.autotune import AUTOTUNE
from bessemer.training.runtime import Runtime

#: Sides of the matrices of the timed products: the first, and the largest; products in 16 bits run faster than they sustain
#: while they are small.
_SMALLEST_SIDE, _SIDE, _SIDE_HALF = 128, 1024, 2048
#: The side is doubled while a product is expected to take no longer than this, in seconds.
_LONGEST = 0.1
#: Shortest and longest duration of the measurement in seconds, and fewest repetitions.
_SECONDS, _MOST_SECONDS, _TIMES = 0.4, 0.6, 4


def device_peak(out: Path, runtime: Runtime, card_flops: Callable[[str], float | None] = lambda name: None) -> float | None:
    """Peak FLOP/s of one process's device; None where it is unknown.

    On a GPU, `card_flops` of its name: the vendor's dense bfloat16 figure, the convention of MFU whatever the run's dtype. On a
    CPU, measured when a run starts, in the run's dtype and with its threads, and kept in its `autotune.json`. Called by the
    process that writes, after `prepare_run`.
    """
    if torch.device(runtime.device).type != "cpu":
        return card_flops(runtime.processor)
    place = out / AUTOTUNE
    written = read_json(place, "record of a run's start")
    if "peak_flops" not in written:
        written["peak_flops"] = measured_peak(runtime)
        write_json(place, written)
    return float(written["peak_flops"])


def measured_peak(runtime: Runtime) -> float:
    """FLOP/s of the fastest of several large matmuls, in the runtime's dtype and with its threads.

    Takes about half a second, and less than one in a dtype in which this processor multiplies a hundred times slower: the
    matrices are then smaller.
    """
    with runtime.running():
        dtype = getattr(torch, runtime.dtype)
        side, largest = _SMALLEST_SIDE, _SIDE if dtype == torch.float32 else _SIDE_HALF
        while side < largest and 8 * min(_seconds(side, dtype) for _ in range(2)) <= _LONGEST:
            side *= 2
        times: list[float] = []
        while len(times) < 2 or (sum(times) < _MOST_SECONDS and (len(times) < _TIMES or sum(times) < _SECONDS)):
            times.append(_seconds(side, dtype))
    return round(2 * side**3 / min(times[1:]), -6)


def _seconds(side: int, dtype: torch.dtype) -> float:
    """Seconds of one product of square matrices."""
    left, right = (torch.full((side, side), 0.5, dtype=dtype) for _ in range(2))
    start = time.perf_counter()
    torch.mm(left, right)
    return time.perf_counter() - start
