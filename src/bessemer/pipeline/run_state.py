"""How far a run has come, seen from beside it: its stages, what feeds them, and the one that is at work.

While the runner makes a stage, `RUN/working.json` says which and since when; a failure leaves it there with its reason. Whether
the stage is still at work says the lock of its key, which the system frees when a process dies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import MANIFEST, Store, read_json, write_json
from bessemer.pipeline.recipe import recorded_stages
from bessemer.pipeline.run_folder import RunFolder
from bessemer.pipeline.stages import STAGES

WORKING = "working.json"

#: running: a process is at work on it. interrupted: it began, and no process is. failed: it ended with an error.
StageStatus = Literal["done", "running", "interrupted", "failed", "waiting"]


@dataclass(frozen=True)
class StageState:
    """A stage of a run.

    feeds: the stages that it reads. folder: what it has made, or so far has; None where there is nothing. steps: of its
    training, where it trains and they are known. seconds: of the work, of a finished one. problem: why it failed.
    """

    name: str
    kind: str
    feeds: tuple[str, ...]
    status: StageStatus
    key: str | None = None
    folder: Path | None = None
    steps: int | None = None
    started: str | None = None
    seconds: float | None = None
    summary: str = ""
    problem: str | None = None


class WorkingNote:
    """`working.json` of a run, which the runner writes."""

    def __init__(self, run: RunFolder) -> None:
        self._path = run.folder / WORKING

    def begin(self, stage: str, key: str, settings: Any) -> None:
        """A stage is at work. settings: its own, which may say how many steps it trains."""
        steps = getattr(settings, "steps", None)
        self._write({"stage": stage, "key": key, "started": datetime.now(UTC).isoformat(timespec="seconds"), "steps": steps})

    def fail(self, problem: str) -> None:
        """The stage has ended with an error."""
        if self._path.exists():
            self._write({**read_json(self._path, "note of a run"), "problem": problem})

    def end(self, stage: str | None = None) -> None:
        """The stage is there. stage: only where the note is of this one; None: of any."""
        try:
            if stage is None or _working(self._path).get("stage") == stage:
                self._path.unlink(missing_ok=True)
        except OSError:
            pass

    def _write(self, values: dict[str, Any]) -> None:
        try:
            write_json(self._path, values)
        except OSError:
            # a full disk: the run itself says so
            pass


def stage_states(run: RunFolder) -> list[StageState]:
    """The stages of a run in the order of its recipe. Raises ArtefactError for a folder that is no run's."""
    record = run.record()
    feeds = _feeds(record["recipe"])
    working = _working(run.folder / WORKING)
    made = run.stages()
    store = Store(run.store_root)
    states: list[StageState] = []
    stale: set[str] = set()
    for name, (kind, reads) in feeds.items():
        # what an earlier recipe made of what is being made anew is of no more use
        found = None if stale.intersection(reads) else made.get(name)
        state = _state(store, name, kind, reads, found, working)
        if state.status != "done" and (state.status != "waiting" or stale.intersection(reads)):
            stale.add(name)
        states.append(state)
    return states


def _state(
    store: Store, name: str, kind: str, reads: tuple[str, ...], made: Path | None, working: Mapping[str, Any]
) -> StageState:
    if working.get("stage") == name:
        partial = store.partial(working["key"])
        status: StageStatus = "failed" if "problem" in working else "interrupted"
        if store.is_locked(working["key"]):
            status = "running"
        elif store.find(working["key"]) is not None:
            # published, and killed before the note was removed
            return _finished(name, kind, reads, made or store.root / working["key"])
        return StageState(
            name,
            kind,
            reads,
            status,
            working["key"],
            partial if partial.exists() else None,
            working.get("steps"),
            working.get("started"),
            problem=working.get("problem"),
        )
    if made is None:
        return StageState(name, kind, reads, "waiting")
    return _finished(name, kind, reads, made)


def _finished(name: str, kind: str, reads: tuple[str, ...], folder: Path) -> StageState:
    manifest = read_json(folder / MANIFEST, "manifest")
    summary = STAGES[kind].summary_line(manifest["metrics"]) if kind in STAGES else ""
    steps = manifest["settings"].get("steps") if isinstance(manifest.get("settings"), dict) else None
    return StageState(
        name, kind, reads, "done", manifest["key"], folder, steps, manifest["created"], manifest["seconds"], summary
    )


def _feeds(recipe: Mapping[str, Any]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Stage → its kind and what feeds it. Of a recipe that is not understood here, as one of a package that is no longer
    installed, the names alone."""
    try:
        stages = recorded_stages(recipe)
    except ConfigError:
        names = (
            name for name, section in recipe.items() if name in STAGES or (isinstance(section, dict) and "kind" in section)
        )
        return {name: (name, ()) for name in names}
    return {
        stage.name: (stage.spec.kind, tuple(dict.fromkeys(source.stage for source in stage.inputs.values())))
        for stage in stages
    }


def _working(path: Path) -> Mapping[str, Any]:
    """The note; empty where there is none."""
    try:
        found = read_json(path, "note of a run")
    except ArtefactError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("key"), str) else {}
