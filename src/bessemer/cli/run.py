"""`bessemer run`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bessemer.pipeline.api import RunResult
    from bessemer.pipeline.runner import Planned


def run(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name (see `bessemer recipes`) or a .yaml file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE …, e.g. pretrain.learning_rate=3e-3.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    only: Annotated[str | None, typer.Option(help="Make this stage alone; what feeds it must be finished.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and why; write nothing.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the runs and their store.")] = Path("runs"),
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let the recipe run code of its own.")] = False,
) -> None:
    """Run a recipe; finished stages are reused."""
    from bessemer.core.progress import progress_for_terminal
    from bessemer.pipeline.api import execute, prepare
    from bessemer.pipeline.ranks import Ranks

    ranks, progress = Ranks.from_environment(os.environ), progress_for_terminal()
    runner = prepare(
        recipe,
        overrides or [],
        name=name,
        runs=runs,
        until=until,
        only=only,
        allow_code=allow_code,
        progress=progress,
        ranks=ranks,
        claim=not dry_run,
    )
    if dry_run:
        _show_plan(runner.plan(until=until or only))
        return
    if ranks.leads:
        progress.say(f"run {runner.run_folder.name}, in {runner.run_folder.folder}")
    result = execute(runner, until=until, only=only, ranks=ranks)
    if ranks.leads:
        _close(result)


def _close(result: RunResult) -> None:
    """The last lines: what was made, what to type next."""
    from bessemer.core.figures import duration
    from bessemer.pipeline.report import next_steps, run_report, sentences

    reused = sum(one.reused for one in result.made)
    stages = run_report(result.run)
    print(f"\n{result.run.name}: done in {duration(result.seconds)}, {reused} of {len(result.made)} stages reused.")
    for line in sentences(stages):
        print(line)
    print()
    if (result.folder / "report.html").exists():
        print(f"Report: {result.folder / 'report.html'}")
    if (result.folder / "model").exists():
        print(f"Model:  {result.folder / 'model'}")
    print("Next:")
    for line in next_steps(stages):
        print(f"  {line}")


def _show_plan(planned: list[Planned]) -> None:
    width = max(len(one.stage.name) for one in planned)
    for one in planned:
        print(f"{one.stage.name:<{width}}  {one.action:<6}  {one.why}")
