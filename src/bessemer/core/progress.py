"""Progress of long work: bars in a terminal, plain lines elsewhere, nothing when a library caller wants quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, Protocol

from bessemer.core.metrics import duration, size


class Task(Protocol):
    """One piece of long work under way."""

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Count `amount` more units as done; `note` replaces the text behind the bar."""

    def reach(self, completed: float, note: str | None = None) -> None:
        """Set how many units are done."""


class Progress(Protocol):
    """Receiver of progress reports. Packages take one as an argument; the command line chooses it."""

    def say(self, line: str) -> None:
        """Print one line that stays."""

    def task(
        self, description: str, total: float | None = None, unit: str = "", completed: float = 0
    ) -> AbstractContextManager[Task]:
        """A context manager that gives a `Task` of `total` units (unknown when None), `completed` of them done before."""


class Speed:
    """Documents and bytes per second since this object was created, as the text behind a bar."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def of(self, documents: int, bytes_: float) -> str:
        """The rate so far: `1,204 documents/s · 3.4 MB/s`."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        return f"{documents / elapsed:,.0f} documents/s · {size(bytes_ / elapsed)}/s"


class _SilentTask:
    def advance(self, amount: float = 1, note: str | None = None) -> None: ...
    def reach(self, completed: float, note: str | None = None) -> None: ...


class Silent:
    """Reports nothing: the default of the Python API and of tests."""

    def say(self, line: str) -> None: ...

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "", completed: float = 0) -> Iterator[Task]:
        yield _SilentTask()


class _PlainTask:
    def __init__(self, owner: PlainLines, description: str, total: float | None, unit: str, completed: float) -> None:
        self._owner = owner
        self._description = description
        self._total = total
        self._unit = unit
        self._completed = self._before = completed
        self._start = self._last = time.monotonic()
        self._note = ""

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        self.reach(self._completed + amount, note)

    def reach(self, completed: float, note: str | None = None) -> None:
        self._completed = completed
        if note is not None:
            self._note = note
        now = time.monotonic()
        if now - self._last >= self._owner.interval:
            self._last = now
            self.show()

    def show(self) -> None:
        """Print the line now."""
        amount = (
            f"{self._completed:,.0f}"
            + (f"/{self._total:,.0f}" if self._total else "")
            + (f" {self._unit}" if self._unit else "")
        )
        elapsed = time.monotonic() - self._start
        left = ""
        if self._total and self._before < self._completed < self._total:
            speed = (self._completed - self._before) / elapsed
            left = f" · {duration((self._total - self._completed) / speed)} left"
        self._owner.say(f"  {self._description}: {amount}{' · ' + self._note if self._note else ''}{left}")


class PlainLines:
    """One line every `interval` seconds: for logs, CI and pipes."""

    def __init__(self, stream: IO[str] | None = None, interval: float = 10.0) -> None:
        self._stream = stream or sys.stderr
        self.interval = interval

    def say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "", completed: float = 0) -> Iterator[Task]:
        task = _PlainTask(self, description, total, unit, completed)
        yield task
        if time.monotonic() - task._start >= self.interval:
            task.show()


class _BarTask:
    def __init__(self, bars: object, identity: int) -> None:
        self._bars = bars
        self._identity = identity

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        self._bars.update(self._identity, advance=amount, **({} if note is None else {"note": note}))  # type: ignore[attr-defined]

    def reach(self, completed: float, note: str | None = None) -> None:
        self._bars.update(self._identity, completed=completed, **({} if note is None else {"note": note}))  # type: ignore[attr-defined]


class Bars:
    """rich's bars, one per task, gone when it is done."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    def say(self, line: str) -> None:
        self._console.print(line, markup=False)

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "", completed: float = 0) -> Iterator[Task]:
        from rich import progress as rich_progress

        columns = (
            rich_progress.TextColumn("  {task.description}", markup=False),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn(unit, markup=False),
            rich_progress.TextColumn("{task.fields[note]}", markup=False),
            rich_progress.TimeRemainingColumn(compact=True),
        )
        with rich_progress.Progress(*columns, console=self._console, transient=True) as bars:
            yield _BarTask(bars, bars.add_task(description, total=total, completed=int(completed), note=""))


def progress_for_terminal() -> Progress:
    """Bars when standard error is a terminal, plain lines otherwise."""
    return Bars() if sys.stderr.isatty() else PlainLines()
