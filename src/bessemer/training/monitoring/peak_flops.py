"""Peak FLOP/s for MFU: vendor figure on a GPU, measured matmul on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from bessemer.core.store import read_json, write_json
from bessemer.training.autotune import AUTOTUNE
from bessemer.training.runtime import Runtime

#: Side of the matrices of the timed matmul; larger in 16 bits, whose first milliseconds run faster than what it sustains.
_SIDE, _SIDE_HALF = 1024, 2048
#: Shortest duration of the measurement in seconds, and fewest repetitions.
_SECONDS, _TIMES = 0.4, 4


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
    """FLOP/s of the fastest of several large matmuls, in the runtime's dtype and with its threads."""
    with runtime.running():
        dtype = getattr(torch, runtime.dtype)
        side = _SIDE if dtype == torch.float32 else _SIDE_HALF
        left, right = (torch.full((side, side), 0.5, dtype=dtype) for _ in range(2))
        times: list[float] = []
        while len(times) < _TIMES + 1 or sum(times) < _SECONDS:
            start = time.perf_counter()
            torch.mm(left, right)
            times.append(time.perf_counter() - start)
    return round(2 * side**3 / min(times[1:]), -6)
