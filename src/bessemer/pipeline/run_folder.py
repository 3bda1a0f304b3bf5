"""A run's folder, `runs/NAME/`: the report, the metrics, and links into the store beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.core.metrics import read_metrics
from bessemer.core.store import MANIFEST, Store, follow, link, read_json, write_json, write_text
from bessemer.pipeline.made import Made
from bessemer.pipeline.stages import STAGES

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
        """The folder for a recipe: `--name`, or the recipe's name, or, where a run of that name was made otherwise, with
        overrides `NAME-2`, `NAME-3`, ….

        The same overrides again find their own folder again.
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
        """As `choose`, and the recipe is written down in the folder before another process chooses one."""
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
        """Write down the recipe before anything runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.record() if (self.folder / "run.json").exists() else {}
        write_json(
            self.folder / "run.json",
            {"format": RUN_FORMAT, "name": self.name, "recipe": values, "stages": before.get("stages", {})},
        )

    def finish(self, made: list[Made], seconds: float) -> None:
        """Write down which artefacts the run consists of, and gather its metrics in one file."""
        record = self.record()
        before = {name: entry for name, entry in record["stages"].items() if name in record["recipe"]}
        record["stages"] = before | {one.stage.name: {"key": one.artefact.key, "reused": one.reused} for one in made}
        record["seconds"] = round(seconds, 3)
        write_json(self.folder / "run.json", record)
        for stale in (self.folder / "stages").iterdir() if (self.folder / "stages").exists() else ():
            if stale.name not in record["stages"]:
                stale.unlink()
        lines = [
            json.dumps({"stage": one.stage.name, **entry}) + "\n"
            for one in made
            for entry in read_metrics(one.artefact.folder / "metrics.jsonl")
        ]
        if lines:
            write_text(self.folder / "metrics.jsonl", "".join(lines))

    def link_stage(self, one: Made) -> None:
        """Lead `stages/STAGE`, and the links at the top that this stage serves, to its artefact."""
        link(self.folder / "stages" / one.stage.name, one.artefact.folder)
        for name, place in one.stage.spec.links.items():
            if (one.artefact.folder / place).exists():
                link(self.folder / name, one.artefact.folder / place)

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
