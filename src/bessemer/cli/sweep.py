"""`bessemer sweep`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bessemer.pipeline.sweep import Outcome


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
    from rich.console import Console

    from bessemer.core.config import nearest
    from bessemer.core.errors import ConfigError
    from bessemer.core.progress import progress_for_terminal
    from bessemer.pipeline.ranks import Ranks
    from bessemer.pipeline.run_points import LOSSES
    from bessemer.pipeline.sweep import members, sweep_rows, write_sweep
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
    Console(highlight=False, soft_wrap=True).print(show_sweep(sweep_rows(outcomes, metric), list(chosen[0].varied)))
    print(f"\nTable: {table}")
    _plot(table.with_suffix(".svg"), outcomes, metric)
    failed = sum(one.problem is not None for one in outcomes)
    if failed:
        print(f"{failed} of {len(outcomes)} failed; the same command tries them again.")
        raise typer.Exit(1)


def _plot(path: Path, outcomes: list[Outcome], metric: str) -> None:
    from bessemer.core.packages import missing_package
    from bessemer.core.store import write_text
    from bessemer.pipeline.sweep import sweep_rows
    from bessemer.views.scaling import sweep_curves

    curves = sweep_curves(sweep_rows(outcomes, metric), list(outcomes[0].member.varied))
    if curves is None or missing_package(["matplotlib"]) is not None:
        return
    from bessemer.views.scaling_charts import sweep_chart

    axis, lines = curves
    write_text(path, sweep_chart(lines, axis, metric))
    print(f"Plot:  {path}")
