"""What a device could do at most: a card's promise, or what large products reach on a processor. For the share of it that
training reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from bessemer.core.store import read_json, write_json
from bessemer.training.autotune import STARTUP
from bessemer.training.runtime import Session

#: Side of the matrices whose product is timed: in half the bits it is fast for an instant, and what it keeps up is asked.
_SIDE, _SIDE_HALF = 1024, 2048
#: For how long it is repeated, in seconds, and how often at least.
_SECONDS, _TIMES = 0.4, 4


def device_peak(out: Path, session: Session, card_flops: Callable[[str], float | None] = lambda name: None) -> float | None:
    """The peak of the device that one process works on, in FLOP/s; None where nobody knows.

    A GPU's is what `card_flops` says of its name, dense in bfloat16, the field's convention whatever the run's types. A
    processor's is measured when a run starts, in the run's type and on its threads, and kept in its `startup.json`. Called by
    the process that writes, in a run that has begun.
    """
    if torch.device(session.device).type != "cpu":
        return card_flops(session.processor)
    place = out / STARTUP
    written = read_json(place, "record of a run's start")
    if "peak_flops" not in written:
        written["peak_flops"] = measured_peak(session)
        write_json(place, written)
    return float(written["peak_flops"])


def measured_peak(session: Session) -> float:
    """The best of some large products in a session's type and on its threads, in FLOP/s."""
    with session.running():
        dtype = getattr(torch, session.dtype)
        side = _SIDE if dtype == torch.float32 else _SIDE_HALF
        left, right = (torch.full((side, side), 0.5, dtype=dtype) for _ in range(2))
        times: list[float] = []
        while len(times) < _TIMES + 1 or sum(times) < _SECONDS:
            start = time.perf_counter()
            torch.mm(left, right)
            times.append(time.perf_counter() - start)
    return round(2 * side**3 / min(times[1:]), -6)
