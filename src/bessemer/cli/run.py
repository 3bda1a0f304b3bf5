"""`bessemer init`, `recipes`, `run` and `sweep`: from a recipe to one run, or to one of each combination of settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.options import print_view

if TYPE_CHECKING:
    from bessemer.pipeline.api import RunResult
    from bessemer.pipeline.stage_planner import StagePlan
    from bessemer.pipeline.sweep import Outcome


def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A file or folder of your text, which stays where it is; again for more."),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", help="Continue an open model instead of a new one: its folder, or anything that `bessemer import` takes."
        ),
    ] = None,
) -> None:
    """Start a folder of your own: a recipe for your text, a place for it, notes. Nothing that exists is overwritten."""
    import os
    import re
    import shlex

    from bessemer.core.errors import ConfigError
    from bessemer.core.store import write_text
    from bessemer.pipeline.own_text import OwnText, amount, find_text, starting_files
    from bessemer.training.report import too_little_text

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "my-model"
    own = find_text(text, folder) if text else OwnText()
    there = from_ is not None and Path(from_).is_dir()
    model = Path(os.path.relpath(Path(from_).resolve(), folder.resolve())).as_posix() if from_ and there else from_ and "base"
    files = starting_files(name, own, model)
    taken = [file for file in files if (folder / file).exists()]
    if taken:
        raise ConfigError(f"{folder / taken[0]}: exists already; name another folder")
    try:
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / file, content)
    except OSError:
        # all files or none: the same command would refuse those that exist
        for file in files:
            (folder / file).unlink(missing_ok=True)
        raise
    print(f"made {folder}: a recipe for {amount(own) if text else 'the text in ' + str(folder / 'data')}")
    if own.too_little and from_ is None:
        print(f"note: {too_little_text(own.size or 0)}")
    if not text:
        print(f"put your text (.txt, .md, .jsonl) into {folder / 'data'}")
    print(f"next:\n  cd {shlex.quote(str(folder))}")
    if from_ is not None and not there:
        # the path is given from here, and the command is typed in the folder
        source = os.path.relpath(Path(from_).resolve(), folder.resolve()) if Path(from_).exists() else from_
        print(f"  bessemer import {shlex.quote(source)} base")
    print("  bessemer run recipe.yaml --dry-run\n  bessemer run recipe.yaml")


def recipes(
    action: Annotated[str | None, typer.Argument(help="`show` prints one recipe.")] = None,
    name: Annotated[str | None, typer.Argument(help="The recipe to show: its name, or a .yaml file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="With --full: KEY=VALUE …, as in `bessemer run`.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Show every setting, with the line of the file that it comes from, or its default.")
    ] = False,
) -> None:
    """List the recipes that ship with Bessemer, or show one."""
    from bessemer.core.errors import ConfigError
    from bessemer.core.yaml_file import read_yaml
    from bessemer.pipeline.recipe import find_recipe, load_recipe, shipped_recipes

    if action is None:
        shipped = shipped_recipes()
        width = max(map(len, shipped))
        for recipe, path in shipped.items():
            print(f"{recipe:<{width}}  {read_yaml(path).values.get('description', '')}")
        return
    if action != "show" or name is None:
        raise ConfigError("say `bessemer recipes`, or `bessemer recipes show NAME`")
    if full:
        from bessemer.pipeline.recipe_settings import recipe_settings

        # allowed, since showing a recipe runs none of its code
        for line in recipe_settings(load_recipe(name, overrides or [], allow_code=True)):
            print(line)
        return
    if overrides:
        raise ConfigError(f"{overrides[0]}: say --full, which shows the settings with overrides on top")
    print(find_recipe(name).read_text(encoding="utf-8"), end="")


def run(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name (see `bessemer recipes`) or a .yaml file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE …, e.g. pretrain.learning_rate=3e-3.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    only: Annotated[str | None, typer.Option(help="Run only this stage; those before it must be finished.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would run and why; write nothing.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the runs and their store.")] = Path("runs"),
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let the recipe run code of its own.")] = False,
) -> None:
    """Run a recipe; finished stages are reused."""
    from bessemer.core.progress import progress_for_terminal
    from bessemer.pipeline.api import execute, prepare
    from bessemer.pipeline.launch import Ranks

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
    """Print what was made, and what to type next."""
    from bessemer.core.metrics import duration
    from bessemer.pipeline.report import next_steps, run_report, sentences

    reused = sum(result_of_stage.reused for result_of_stage in result.made)
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


def _show_plan(plans: list[StagePlan]) -> None:
    width = max(len(plan.stage.name) for plan in plans)
    for plan in plans:
        print(f"{plan.stage.name:<{width}}  {plan.action:<6}  {plan.why}")


def sweep(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a .yaml file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="KEY=A,B,C …, as in pretrain.learning_rate=1e-3,3e-3; KEY=VALUE is the same in all."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each combination.", min=1)] = 1,
    zipped: Annotated[
        list[str] | None,
        typer.Option(
            "--zip", help="KEY,KEY: their values go together one by one, as width and depth of a ladder; may be repeated."
        ),
    ] = None,
    metric: Annotated[str, typer.Option(help="The loss of the plot: bits_per_byte or validation_loss.")] = "bits_per_byte",
    name: Annotated[str | None, typer.Option(help="What the runs' names begin with; else the recipe's name.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop each run after this stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs; write nothing.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the runs and their store.")] = Path("runs"),
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let the recipe run code of its own.")] = False,
) -> None:
    """Run a recipe with every combination of some settings: grids, ladders, seeds.

    Members share finished stages; one that fails does not stop the others; the same command again goes on with what is missing.
    Ends in one table, `runs/sweeps/NAME.csv` (which `bessemer scaling fit` reads) and a plot beside it.
    """
    from bessemer.core.config import nearest
    from bessemer.core.errors import ConfigError
    from bessemer.core.progress import progress_for_terminal
    from bessemer.pipeline.launch import Ranks
    from bessemer.pipeline.sweep import LOSSES, members, sweep_rows, write_sweep
    from bessemer.pipeline.sweep import sweep as run_sweep
    from bessemer.views.scaling import show_sweep

    if metric not in LOSSES:
        raise ConfigError(f"--metric {metric}: it is {' or '.join(LOSSES)}{nearest(metric, list(LOSSES))}")
    if not Ranks.from_environment(os.environ).alone:
        raise ConfigError("start a sweep in one process: the recipe's launch starts those of each run")
    groups = [group.split(",") for group in zipped or ()]
    chosen = members(recipe, settings or [], seeds=seeds, zipped=groups, name=name, allow_code=allow_code)
    if dry_run:
        for member in chosen:
            print(" ".join([member.name, *member.overrides]))
        return
    table = runs / "sweeps" / f"{chosen[0].base}.csv"
    outcomes = run_sweep(
        recipe,
        chosen,
        runs=runs,
        until=until,
        allow_code=allow_code,
        progress=progress_for_terminal(),
        on_outcome=lambda so_far: write_sweep(table, so_far, metric),
    )
    print_view(show_sweep(sweep_rows(outcomes, metric), list(chosen[0].varied)), soft_wrap=True)
    print(f"\nTable: {table}")
    _plot(table.with_suffix(".svg"), outcomes, metric)
    failed = sum(outcome.problem is not None for outcome in outcomes)
    if failed:
        print(f"{failed} of {len(outcomes)} failed; the same command tries them again.")
        raise typer.Exit(1)


def _plot(path: Path, outcomes: list[Outcome], metric: str) -> None:
    from bessemer.core.environment import missing_package
    from bessemer.core.store import write_text
    from bessemer.pipeline.sweep import sweep_rows
    from bessemer.views.scaling import sweep_curves

    curves = sweep_curves(sweep_rows(outcomes, metric), list(outcomes[0].member.varied))
    if curves is None or missing_package(["matplotlib"]) is not None:
        return
    from bessemer.views.charts import sweep_chart

    axis, lines = curves
    write_text(path, sweep_chart(lines, axis, metric))
    print(f"Plot:  {path}")
