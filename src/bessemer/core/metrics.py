"""`metrics.jsonl`: one JSON object a step, with stable keys, readable by pandas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

#: The file's name in a stage's folder.
METRICS = "metrics.jsonl"


class Tracker(Protocol):
    """Something else that wants the same records."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Take one record: numbers by key."""

    def close(self, *, failed: bool) -> None:
        """No more come. failed: because of an error."""


class MetricsLog:
    """Appends records to a `metrics.jsonl`. Each has an integer `step`; on resume, records past it are cut away."""

    def __init__(
        self, path: Path, resume_at: int | None = None, *, writes: bool = True, trackers: Sequence[Tracker] = ()
    ) -> None:
        """Open for appending. `resume_at`: the step that training goes on from; records of later steps, and a last
        line that a crash cut in two, are removed. None starts a new file. writes: False for a process that another one
        speaks for: nothing is opened and nothing written. trackers: are told of every record, and closed with the file."""
        self._trackers = trackers if writes else ()
        self._stream: IO[str] | None = None
        if not writes:
            return
        kept = [] if resume_at is None else [record for record in read_metrics(path) if record["step"] <= resume_at]
        temporary = path.with_suffix(".rewrite")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        temporary.replace(path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Append one record and hand it to the system, so that a killed run keeps it."""
        if self._stream is not None:
            self._stream.write(json.dumps({"step": step, **values}) + "\n")
            self._stream.flush()
        for tracker in self._trackers:
            tracker.write(step, values)

    def close(self, *, failed: bool = False) -> None:
        """Close the file, and the trackers. failed: because of an error."""
        if self._stream is not None:
            self._stream.close()
        for tracker in self._trackers:
            tracker.close(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=error is not None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a `metrics.jsonl`; an unfinished last line is left out; empty when there is no file."""
    if not path.exists():
        return []
    records = []
    # not `splitlines`, which also breaks at a few characters that JSON writes as they are
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
