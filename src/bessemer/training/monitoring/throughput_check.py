"""Check of a run's throughput against the measurement that its number of steps comes from.

`minutes` becomes a number of steps by a measurement of a few seconds before the first step. Other load on the machine at that
moment makes the number too small, by the factor by which it slowed the measured steps. The run's first steps reveal it.
"""

from __future__ import annotations

from statistics import median

from bessemer.core.errors import StaleMeasurementError

#: Steps that are not counted: they compile and read cold files.
_FIRST_STEPS = 3
#: A window of steps is judged when it is this long, in seconds and in steps.
_WINDOW_SECONDS, _WINDOW_STEPS = 8.0, 20
#: Ratio between measured and real time of a step that makes a measurement stale.
_STALE = 1.5
#: Fraction of the run in which a throughput above the measured one still restarts it.
_CHECKED_FRACTION = 0.25


class ThroughputCheck:
    """Compares the steps of a run, window by window, with the measured time per step.

    The first window fails when it is faster or slower. Later windows, in the first quarter of the run, fail only when they are
    faster: other load has ended, and more steps fit. A slower one may be other load that will end as well.
    """

    def __init__(self, seconds_per_step: float, steps: int) -> None:
        self._measured = seconds_per_step
        self._last_checked = _CHECKED_FRACTION * steps
        self._count = 0
        self._first = True
        self._window: list[float] = []

    def add_step(self, seconds: float) -> None:
        """Count a step that took `seconds`. Raises StaleMeasurementError when the throughput is not the measured one."""
        self._count += 1
        if self._count <= _FIRST_STEPS or (not self._first and self._count > self._last_checked):
            return
        self._window.append(seconds)
        if len(self._window) < _WINDOW_STEPS or sum(self._window) < _WINDOW_SECONDS:
            return
        actual = median(self._window)
        faster, slower = self._measured / actual, actual / self._measured
        if faster > _STALE or (self._first and slower > _STALE):
            ratio, word = (faster, "less") if faster > 1 else (slower, "more")
            raise StaleMeasurementError(
                f"a step takes {actual * 1000:.0f} ms, {ratio:.1f} times {word} than when this machine was measured"
            )
        self._first = False
        self._window = []
