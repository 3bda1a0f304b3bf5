"""CPU threads of a run, chosen again while it goes on.

Threads of one product wait for each other many times a step. When another program takes a core, the thread that shares it is
late each time, and two threads on two cores can be slower than one. With `threads: auto` a quarter of a second is measured when
a run starts, at each validation, and while something is amiss, and the number that computes most goes on.

Another number rounds sums differently. So each choice is written down with its step, and a run that is resumed repeats those
that were made: it ends with the bits of the run that was not interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional

from bessemer.core.environment import usable_cores
from bessemer.core.store import read_json, write_json

#: Choices by step, in the folder of a run.
THREADS = "threads.json"
#: Length of a measurement in seconds, of all candidates together, and of one turn.
_SECONDS, _TURN_SECONDS = 0.25, 0.02
#: A change must promise this much more work a second; less is noise.
_WORTH_CHANGING = 1.15
#: Between validations: fewest seconds between two choices; steps in a row, and the factor by which they take longer than the
#: first ones after a choice, that make steps slow.
_SECONDS_BETWEEN, _STEPS, _SLOWER = 10.0, 3, 1.5
#: Rows, channels of the product that is timed: that of a small model's block.
_ROWS, _CHANNELS = 1024, 256


def thread_candidates(cores: int) -> tuple[int, ...]:
    """The numbers of threads that are compared: all cores, all but one, half of them."""
    return tuple(sorted({cores, max(1, cores - 1), max(1, cores // 2)}, reverse=True))


def faster_threads(current: int, candidates: Sequence[int], rate: Callable[[int, float], float] | None = None) -> int:
    """The number of threads by which this machine computes most at present; `current` unless another is clearly better.

    rate: work a second with a number of threads, measured for some seconds. Leaves the number of threads as it was.
    """
    rate = rate or _work_per_second
    others = [number for number in candidates if number != current]
    if not others:
        return current
    turns = max(1, round(_SECONDS / _TURN_SECONDS / (1 + len(others))))
    totals = dict.fromkeys((current, *others), 0.0)
    before = torch.get_num_threads()
    try:
        # in turns, so that what comes and goes meanwhile slows all alike
        for _ in range(turns):
            for number in totals:
                totals[number] += rate(number, _TURN_SECONDS)
    finally:
        torch.set_num_threads(before)
    best = max(others, key=lambda number: totals[number])
    return best if totals[best] > _WORTH_CHANGING * totals[current] else current


def _work_per_second(threads: int, seconds: float) -> float:
    """Layers of a small model a second: products, and between them what is done element by element."""
    torch.set_num_threads(threads)
    hidden, weight = torch.ones(_ROWS, _CHANNELS), torch.full((_CHANNELS, _CHANNELS), 1 / _CHANNELS)
    start, count = time.perf_counter(), 0
    with torch.no_grad():
        while (elapsed := time.perf_counter() - start) < seconds or not count:
            hidden = functional.silu(functional.rms_norm(hidden @ weight, (_CHANNELS,)))
            count += 1
    return count / max(elapsed, 1e-9)


@contextmanager
def with_threads(number: int | None) -> Iterator[None]:
    """While entered, PyTorch computes with a number of threads; None: as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ThreadChoices:
    """The numbers of threads of a run by step, as they are chosen, or as they were before it was interrupted.

    They are chosen at validations; while some cores are not used, or steps have become slow, every ten seconds besides.
    """

    def __init__(self, out: Path, threads: int, *, choose: Callable[[int, Sequence[int]], int] | None = None) -> None:
        """out: the run's folder. threads: with which it starts. choose: a number from the present one and the candidates; None:
        `faster_threads`."""
        self._place = out / THREADS
        self._first = threads
        self._choose = choose or faster_threads
        self._candidates = thread_candidates(usable_cores())
        self._by_step: dict[int, int] = {}
        #: Seconds of the steps since the last choice, and when that was.
        self._seconds: list[float] = []
        self._chosen_at = time.monotonic()
        if self._place.exists():
            written = read_json(self._place, "record of a run's threads")
            self._first = written["first"]
            self._by_step = {int(step): number for step, number in written["by_step"].items()}

    def resume(self, step: int) -> int:
        """Set and return the number that a run had after `step` steps."""
        number = self._at(step)
        torch.set_num_threads(number)
        return number

    def after_step(self, step: int, seconds: float, *, validated: bool) -> int | None:
        """Set the number for the steps that follow `step` finished ones, the last of which took `seconds`; it, where it was
        chosen, or was once chosen, here. validated: whether the model was validated after this step."""
        self._seconds.append(seconds)
        if step < max(self._by_step, default=0) or step in self._by_step:
            # made before the run was interrupted: repeated
            return self.resume(step) if step in self._by_step else None
        if not validated and not self._is_due():
            return None
        self._by_step[step] = self._choose(self._at(step), self._candidates)
        write_json(self._place, {"first": self._first, "by_step": self._by_step})
        self._seconds, self._chosen_at = [], time.monotonic()
        return self.resume(step)

    def _is_due(self) -> bool:
        if time.monotonic() - self._chosen_at < _SECONDS_BETWEEN:
            return False
        if torch.get_num_threads() < self._candidates[0]:
            return True
        first, last = self._seconds[:_STEPS], self._seconds[_STEPS:][-_STEPS:]
        return len(last) == _STEPS and min(last) > _SLOWER * median(first)

    def _at(self, step: int) -> int:
        """The number of threads of the step that follows `step` finished ones."""
        return next((self._by_step[at] for at in sorted(self._by_step, reverse=True) if at <= step), self._first)
