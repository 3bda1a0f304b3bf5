"""Whether a run goes at the pace that it was sized by.

`minutes` becomes a number of steps by a measurement of some seconds before the first step. Other work on the machine at that
moment makes the number too small, by the factor by which it slowed the measured steps. The run's own first steps show it.
"""

from __future__ import annotations

from statistics import median

from bessemer.core.errors import StaleMeasurementError

#: Steps that are not looked at: they compile and read cold files.
_FIRST_STEPS = 3
#: A window of steps is judged when it is this long, in seconds and in steps.
_WINDOW_SECONDS, _WINDOW_STEPS = 8.0, 20
#: Ratio between measured and real time of a step that makes a measurement stale.
_STALE = 1.5
#: Share of the run in which a faster pace than measured still starts it anew.
_WATCHED_SHARE = 0.25


class PaceCheck:
    """Judges the steps of a run, window by window, against the measured pace.

    The first window may differ either way. Later ones, in the first quarter of the run, only count when they are faster:
    other work has ended, and more steps fit. A slower one may be other work that has begun and will end as well.
    """

    def __init__(self, seconds_per_step: float, steps: int) -> None:
        self._measured, self._last_watched = seconds_per_step, _WATCHED_SHARE * steps
        self._seen = 0
        self._first = True
        self._window: list[float] = []

    def note(self, seconds: float) -> None:
        """One more step took `seconds`. Raises StaleMeasurementError when the pace is another than was measured."""
        self._seen += 1
        if self._seen <= _FIRST_STEPS or (not self._first and self._seen > self._last_watched):
            return
        self._window.append(seconds)
        if len(self._window) < _WINDOW_STEPS or sum(self._window) < _WINDOW_SECONDS:
            return
        real = median(self._window)
        faster, slower = self._measured / real, real / self._measured
        if faster > _STALE or (self._first and slower > _STALE):
            ratio, word = (faster, "less") if faster > 1 else (slower, "more")
            raise StaleMeasurementError(
                f"a step takes {real * 1000:.0f} ms, {ratio:.1f} times {word} than when this machine was measured"
            )
        self._first, self._window = False, []
