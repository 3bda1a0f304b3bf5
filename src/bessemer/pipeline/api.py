"""`bessemer.run`: a recipe from Python, and what the command line does with it; `bessemer.refine`, its data stages alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.core.environment import missing_package
from bessemer.core.errors import writing_to
from bessemer.core.progress import Progress
from bessemer.pipeline.launch import Ranks, RunRequest, as_texts, launcher
from bessemer.pipeline.recipe import Recipe, load_recipe
from bessemer.pipeline.report import write_report
from bessemer.pipeline.run_folder import RunFolder, StageResult
from bessemer.pipeline.runner import Runner

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    run: RunFolder
    recipe: Recipe
    made: list[StageResult]
    seconds: float

    @property
    def folder(self) -> Path:
        """`runs/NAME`, where `model`, `report.html` and the rest are."""
        return self.run.folder


def prepare(
    recipe: str,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    name: str | None = None,
    runs: Path | str = "runs",
    until: str | None = None,
    only: str | None = None,
    allow_code: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    claim: bool = False,
) -> Runner:
    """Check a recipe, the files that it names and what its stages need of this machine, and choose the run's folder.

    claim: make the folder, so that no other run with other overrides takes it. Without it nothing is written.
    Raises ConfigError for the recipe, SourceError for a file that is not there.
    """
    checked = load_recipe(recipe, overrides, allow_code=allow_code)

    def runner_in(choose: Callable[..., RunFolder]) -> Runner:
        run_folder = choose(Path(runs), checked.name, checked.values, overridden=bool(overrides), name=name)
        request = RunRequest(recipe, as_texts(overrides), run_folder.name, str(runs), allow_code)
        launch = launcher(checked.head.launch, request, run_folder.folder, progress)
        return Runner(checked, run_folder, progress=progress, ranks=ranks, launch=launch)

    runner = runner_in(RunFolder.choose)
    runner.check(until=until, only=only)
    if not claim or not (ranks is None or ranks.leads):
        return runner
    with writing_to(runs):
        return runner_in(RunFolder.claim)


def run(
    recipe: str,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    name: str | None = None,
    runs: Path | str = "runs",
    until: str | None = None,
    only: str | None = None,
    allow_code: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Run a recipe (a shipped name or a file) and write its report.

    `overrides`: dotted keys with values (`{"pretrain.steps": 10}`) or `KEY=VALUE` strings. Finished stages are reused.
    Raises BessemerError, one line, for what the user can mend.
    """
    ranks = Ranks.from_environment(os.environ)
    runner = prepare(
        recipe,
        overrides,
        name=name,
        runs=runs,
        until=until,
        only=only,
        allow_code=allow_code,
        progress=progress,
        ranks=ranks,
        claim=True,
    )
    return execute(runner, until=until, only=only, ranks=ranks)


def refine(
    documents: pa.Table,
    config: Mapping[str, Any] | None = None,
    *,
    folder: Path | str = ".",
    progress: Progress | None = None,
) -> tuple[pa.Table, pa.Table]:
    """Clean, select and deduplicate an Arrow table of documents: `bessemer.data.stages.refine` says how."""
    from bessemer.data.stages.refine import refine as refine_tables
    from bessemer.pipeline.stages import open_language_model

    return refine_tables(documents, config, folder=folder, progress=progress, open_model=open_language_model)


def execute(runner: Runner, *, until: str | None = None, only: str | None = None, ranks: Ranks | None = None) -> RunResult:
    """Run what `prepare` checked. Raises ConfigError when there is no stage of the name to stop at."""
    for stage in (until, only):
        if stage is not None:
            runner.recipe.stage(stage)
    start = time.monotonic()
    leads = ranks is None or ranks.leads
    with writing_to(runner.run_folder.runs):
        if leads:
            runner.run_folder.start(runner.recipe.values)
        made = runner.run(until=until, only=only)
        seconds = time.monotonic() - start
        if leads:
            runner.run_folder.finish(made, seconds)
            missing = missing_package(["matplotlib"])
            if missing is None:
                write_report(runner.run_folder)
            else:  # a machine that makes data or trains may do without
                runner.progress.say(f"no report is written: {missing}")
    return RunResult(runner.run_folder, runner.recipe, made, seconds)
