"""A run's folder, `runs/NAME/`: the report, the metrics, links into the store, and the status of the run's stages.

While the runner makes a stage, `RUN/working.json` says which and since when; a failure stays there with its reason. Whether the
stage is still running is read from the lock of its key, which the system frees when a process dies. So another process can read
the status at any time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.core.store import MANIFEST, Artefact, Store, follow, link, read_json, write_json, write_text
from bessemer.pipeline.recipe import Stage, recorded_stages
from bessemer.pipeline.stages import STAGES


@dataclass(frozen=True)
class StageResult:
    """A stage's artefact, and whether this run made it."""

    stage: Stage
    artefact: Artefact
    reused: bool


#: Format number of `run.json`.
RUN_FORMAT = 1

#: The store's folder below that of the runs.
STORE = ".store"


class RunFolder:
    """The folder of one run below `runs`, and the store and download cache that it shares with its neighbours."""

    def __init__(self, runs: Path, name: str) -> None:
        self.runs = runs
        self.name = name
        self.folder = runs / name
        self.store_root = runs / STORE
        self.cache = runs / ".cache"

    @classmethod
    def choose(cls, runs: Path, recipe_name: str, values: dict[str, Any], *, overridden: bool, name: str | None) -> RunFolder:
        """The folder for a recipe: `--name`, or the recipe's name; `NAME-2`, `NAME-3`, … where that run has other overrides.

        The same overrides find the same folder again.
        """
        run = cls(runs, name or recipe_name)
        if name or not overridden:
            return run
        number = 2
        while (run.folder / "run.json").exists() and run.record().get("recipe") != values:
            run = cls(runs, f"{recipe_name}-{number}")
            number += 1
        return run

    @classmethod
    def claim(cls, runs: Path, recipe_name: str, values: dict[str, Any], *, overridden: bool, name: str | None) -> RunFolder:
        """As `choose`, and record the recipe in the folder before another process chooses one."""
        with Store(runs / STORE).lock(f"run-{recipe_name}"):
            run = cls.choose(runs, recipe_name, values, overridden=overridden, name=name)
            run.start(values)
        return run

    def record(self) -> dict[str, Any]:
        """What `run.json` says: the recipe as it ran, the stages and their keys. Raises ArtefactError without one."""
        if not (self.folder / "run.json").exists():
            raise ArtefactError(f"{self.folder}: this is not a run's folder (it has no run.json)")
        record: dict[str, Any] = read_json(self.folder / "run.json", "record of a run")
        return record

    def start(self, values: dict[str, Any]) -> None:
        """Record the recipe before anything runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.record() if (self.folder / "run.json").exists() else {}
        write_json(
            self.folder / "run.json",
            {"format": RUN_FORMAT, "name": self.name, "recipe": values, "stages": before.get("stages", {})},
        )

    def finish(self, made: list[StageResult], seconds: float) -> None:
        """Record the artefacts of the run, and gather its metrics in one file."""
        record = self.record()
        before = {name: entry for name, entry in record["stages"].items() if name in record["recipe"]}
        record["stages"] = before | {
            result.stage.name: {"key": result.artefact.key, "reused": result.reused} for result in made
        }
        record["seconds"] = round(seconds, 3)
        write_json(self.folder / "run.json", record)
        for stale in (self.folder / "stages").iterdir() if (self.folder / "stages").exists() else ():
            if stale.name not in record["stages"]:
                stale.unlink()
        lines = [
            json.dumps({"stage": result.stage.name, **entry}) + "\n"
            for result in made
            for entry in read_metrics(result.artefact.folder / "metrics.jsonl")
        ]
        if lines:
            write_text(self.folder / "metrics.jsonl", "".join(lines))

    def link_stage(self, result: StageResult) -> None:
        """Link `stages/STAGE`, and the stage's links at the top of the folder, to its artefact."""
        made = result.artefact.folder
        link(self.folder / "stages" / result.stage.name, made)
        for name, place in result.stage.spec.links.items():
            if (made / place).exists():
                link(self.folder / name, made / place)

    def stages(self) -> dict[str, Path]:
        """The artefact folders of the run's stages, in the order of its recipe."""
        folder = self.folder / "stages"
        names = list(self.record()["recipe"]) if (self.folder / "run.json").exists() else []
        present = [name for name in names if (folder / name).exists()]
        return {name: follow(folder / name) for name in present}

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of the stage that this run's link leads to, or None."""
        path = follow(self.folder / "stages" / stage) / MANIFEST
        return read_json(path, "manifest") if path.exists() else None

    def metrics(self) -> dict[str, dict[str, Any]]:
        """The headline metrics of each of the run's stages."""
        return {stage: read_json(folder / MANIFEST, "manifest")["metrics"] for stage, folder in self.stages().items()}


def linked_keys(runs: Path) -> set[str]:
    """The store's folders that some run links to."""
    return {
        follow(place).name
        for run in runs.iterdir()
        if run.is_dir() and not run.name.startswith(".")
        for place in (*(run / "stages").glob("*"), *(run / name for spec in STAGES.values() for name in spec.links))
        if place.exists()
    }


WORKING = "working.json"

#: running: a process is at work on it. interrupted: it began, and no process is. failed: it ended with an error.
StageStatus = Literal["done", "running", "interrupted", "failed", "waiting"]


@dataclass(frozen=True)
class StageState:
    """A stage of a run.

    feeds: the stages that it reads. folder: its artefact, finished or not; None where there is none. steps: of its training, if
    known. seconds: of the work, once finished. problem: why it failed.
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
        """A stage has begun. settings: its own, with the number of steps where it trains."""
        steps = getattr(settings, "steps", None)
        self._write({"stage": stage, "key": key, "started": datetime.now(UTC).isoformat(timespec="seconds"), "steps": steps})

    def fail(self, problem: str) -> None:
        """The stage has ended with an error."""
        if self._path.exists():
            self._write({**read_json(self._path, "note of a run"), "problem": problem})

    def end(self, stage: str | None = None) -> None:
        """Remove the note. stage: only a note of this stage; None: of any."""
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
        # an artefact whose inputs are being made again is out of date
        folder = None if stale.intersection(reads) else made.get(name)
        state = _state(store, name, kind, reads, folder, working)
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
            # the run was killed after it published the stage
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
    """Stage → its kind and what feeds it; the names alone of a recipe that cannot be read here."""
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
        note = read_json(path, "note of a run")
    except ArtefactError:
        return {}
    return note if isinstance(note, dict) and isinstance(note.get("key"), str) else {}
