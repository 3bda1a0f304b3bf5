"""`bessemer scaling fit`, `bessemer scaling predict` and `bessemer scaling suggest`."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.options import Runs, print_view

if TYPE_CHECKING:
    from bessemer.scaling.laws.fit import Fit
    from bessemer.scaling.laws.isoflop import IsoFlop, IsoFlopBias
    from bessemer.scaling.laws.parametric import Points
    from bessemer.scaling.suggest import LawInUse

scaling = typer.Typer(
    no_args_is_help=True,
    help="Fit scaling laws to runs, and size a run by one.",
    epilog="Example: bessemer scaling suggest --flops 1e19",
)


class CountChoice(StrEnum):
    """How parameters are counted."""

    all = "all"
    non_embedding = "non-embedding"


class MethodChoice(StrEnum):
    """How the parametric form is fitted."""

    both = "both"
    huber = "huber"
    grid = "grid"


class MetricChoice(StrEnum):
    """Which loss of a run."""

    bits_per_byte = "bits_per_byte"
    validation_loss = "validation_loss"


@scaling.command(epilog="Example: bessemer scaling fit points.csv --isoflop --out law.json")
def fit(
    sources: Annotated[
        list[str],
        typer.Argument(help="A CSV with the columns parameters, tokens, loss (and flops), or runs by name or folder."),
    ],
    method: Annotated[
        MethodChoice, typer.Option(help="Huber with L-BFGS, grid with least squares, or both.")
    ] = MethodChoice.both,
    isoflop: Annotated[bool, typer.Option("--isoflop", help="Fit IsoFLOP parabolas too.")] = False,
    optimal: Annotated[
        bool, typer.Option("--optimal", help="Every point is the best of its compute: fit N, D and L as powers of C.")
    ] = False,
    count: Annotated[CountChoice, typer.Option(help="N with or without the embedding and the head.")] = CountChoice.all,
    metric: Annotated[MetricChoice, typer.Option(help="The loss of runs.")] = MetricChoice.bits_per_byte,
    resamples: Annotated[int, typer.Option(help="Resamples of the bootstrap.", min=20)] = 200,
    confidence: Annotated[float, typer.Option(help="Share that an interval holds.", min=0.5, max=0.999)] = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the law here, for `scaling suggest --law` (the grid's, of both).")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for fit.svg and isoflop.svg.")] = None,
    runs: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Fit L = E + A/N^α + B/D^β to runs or to a CSV, with bootstrap intervals. Points that determine no law give no number."""
    from bessemer.core.errors import ConfigError

    if optimal and (isoflop or out is not None or plots is not None):
        raise ConfigError("--optimal fits powers of the compute alone: leave out --isoflop, --out and --plots")
    points, counting, unit = _points(sources, count, metric, runs)
    if optimal:
        _frontier(points, confidence, counting, as_json)
        return
    from bessemer.scaling.laws.fit import fit_law, write_fit
    from bessemer.scaling.laws.isoflop import fit_isoflop

    methods = ("huber", "grid") if method is MethodChoice.both else (method.value,)
    fits = [
        fit_law(points, fit_method, resamples=resamples, seed=seed, count=count.value, metric=unit)  # type: ignore[arg-type]
        for fit_method in methods
    ]
    parabolas = fit_isoflop(points, confidence=confidence) if isoflop else None
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_fit(out, fits[-1])
    if plots is not None:
        _plot(plots, fits, parabolas)
    _print_fits(fits, parabolas, confidence, counting, as_json)
    if out is not None and not as_json:
        print(f"\nLaw ({fits[-1].method}): {out}")


def _points(sources: list[str], count: CountChoice, metric: MetricChoice, runs: Path) -> tuple[Points, str, str]:
    """(points, how N is counted in words, what L is)."""
    from bessemer.core.errors import ConfigError
    from bessemer.scaling.laws.parametric import read_points
    from bessemer.views.scaling import COUNTS

    tables = [source for source in sources if source.endswith(".csv")]
    if tables:
        if len(sources) > 1:
            raise ConfigError("give one CSV, or runs: not several sources of points")
        given = count is CountChoice.non_embedding
        return read_points(Path(tables[0]), count=count.value), COUNTS[count.value if given else "as given"], "loss"
    from bessemer.cli.named import find_run
    from bessemer.pipeline.sweep import points_of_runs

    folders = [find_run(name, runs) for name in sources]
    return points_of_runs(folders, count=count.value, metric=metric.value), COUNTS[count.value], metric.value


def _bias(fit: Fit) -> IsoFlopBias | None:
    from bessemer.scaling.laws.isoflop import isoflop_bias
    from bessemer.scaling.laws.parametric import DegenerateError

    try:
        return isoflop_bias(fit.points, fit.law)
    except DegenerateError:
        return None


def _plot(folder: Path, fits: list[Fit], parabolas: IsoFlop | None) -> None:
    from bessemer.core.store import write_text
    from bessemer.views.charts import fit_chart, isoflop_chart

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "fit.svg", fit_chart(fits))
    if parabolas is not None:
        write_text(folder / "isoflop.svg", isoflop_chart(parabolas.parabolas, fits[0].metric))


def _print_fits(fits: list[Fit], parabolas: IsoFlop | None, confidence: float, counting: str, as_json: bool) -> None:
    from bessemer.views.scaling import fit_values, show_fits, show_isoflop

    bias = None if parabolas is None else _bias(fits[-1])
    if as_json:
        values: dict[str, Any] = {
            "points": len(fits[0].points),
            "metric": fits[0].metric,
            "parameters_counted": counting,
            "confidence": confidence,
            "fits": [fit_values(fit, confidence) for fit in fits],
        }
        if parabolas is not None:
            values["isoflop"] = asdict(parabolas.parameters) | {
                "bias": None if bias is None else asdict(bias),
                "left_out": list(parabolas.left_out),
            }
        print(json.dumps(values, indent=2))
        return
    isoflop = [] if parabolas is None else [show_isoflop(parabolas, bias)]
    print_view(show_fits(fits, confidence, counting), *isoflop, soft_wrap=True)


def _frontier(points: Points, confidence: float, counting: str, as_json: bool) -> None:
    from bessemer.scaling.laws.isoflop import fit_frontier
    from bessemer.views.scaling import show_frontier

    frontier = fit_frontier(points, confidence=confidence)
    if as_json:
        head = {"points": len(points), "parameters_counted": counting, "confidence": confidence}
        print(json.dumps(head | asdict(frontier), indent=2))
        return
    print_view(show_frontier(frontier, len(points), confidence, counting), soft_wrap=True)


@scaling.command(epilog="Example: bessemer scaling predict 125m --law law.json")
def predict(
    recipe: Annotated[str, typer.Argument(help="Recipe or preset of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings, as in model.hidden_size=192.")] = None,
    law: Annotated[Path | None, typer.Option(help="A law that `scaling fit --out` wrote; else a published one.")] = None,
    confidence: Annotated[float, typer.Option(help="Share that the interval holds.", min=0.5, max=0.999)] = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Predict the loss of a recipe's pretraining before it is run, with the interval of one run."""
    from bessemer.core.errors import ConfigError
    from bessemer.pipeline.planning import training_plan
    from bessemer.scaling.suggest import predict_loss
    from bessemer.views.scaling import prediction_values, show_prediction

    base = training_plan(recipe, overrides or [])
    if base.tokens is None:
        raise ConfigError(f"{recipe}: a prediction needs the number of tokens; give pretrain.tokens=… instead of minutes")
    prediction = predict_loss(_law(law), base.model, base.tokens, base.settings.context_length, confidence)
    if as_json:
        print(json.dumps(prediction_values(prediction, confidence), indent=2))
    else:
        print_view(show_prediction(prediction, confidence), soft_wrap=True)


@scaling.command(epilog="Example: bessemer scaling suggest --gpus 8 --days 2 --out recipe.yaml")
def suggest(
    flops: Annotated[float | None, typer.Option(help="Training FLOPs, as 6 N D counts them.", min=1)] = None,
    gpus: Annotated[int | None, typer.Option(help="Number of cards; with --days instead of --flops.", min=1)] = None,
    gpu: Annotated[str, typer.Option(help="Kind of card: h100, h200, b200, a100, rtx4090, cpu, …")] = "h100",
    days: Annotated[float | None, typer.Option(help="Days of training on them.", min=0.001)] = None,
    law: Annotated[Path | None, typer.Option(help="A law that `scaling fit --out` wrote; else a published one.")] = None,
    recipe: Annotated[str, typer.Option(help="Recipe whose data and tokenizer the run takes.")] = "125m",
    confidence: Annotated[float, typer.Option(help="Share that the interval holds.", min=0.5, max=0.999)] = 0.9,
    out: Annotated[Path | None, typer.Option(help="Write the recipe here, to run it.")] = None,
) -> None:
    """Size a run for a budget: parameters, tokens, batch, learning rate, the predicted loss with its interval, and a recipe."""
    from bessemer.core.errors import ConfigError
    from bessemer.core.store import write_text
    from bessemer.core.yaml_file import dump_yaml
    from bessemer.pipeline.planning import training_plan
    from bessemer.scaling.hardware import find_card
    from bessemer.scaling.suggest import suggest_for_flops, suggest_for_time
    from bessemer.views.scaling import show_suggestion

    if (flops is None) == (days is None):
        raise ConfigError("give a budget: --flops, or --gpus with --days")
    if days is not None and gpus is None:
        raise ConfigError("--days needs the number of cards: --gpus")
    if out is not None and out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{out}: a recipe's file ends in .yaml")
    base = training_plan(recipe)
    sizes = {"vocab_size": base.model.vocab_size, "context_length": base.settings.context_length}
    card, known = find_card(gpu), _law(law)
    if days is not None:
        assert gpus is not None
        suggestion = suggest_for_time(known, days, gpus=gpus, card=card, confidence=confidence, **sizes)
    else:
        assert flops is not None
        suggestion = suggest_for_flops(known, flops, gpus=gpus, card=card if gpus else None, confidence=confidence, **sizes)
    print_view(show_suggestion(suggestion, confidence), soft_wrap=True)
    text = dump_yaml(suggestion.recipe(recipe, base.settings, out.stem if out is not None else "suggested"))
    if out is None:
        print(f"\n{text}", end="")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    print(f"\nNext:\n  bessemer run {out}")


def _law(path: Path | None) -> LawInUse:
    from bessemer.scaling.laws.fit import read_fit
    from bessemer.scaling.suggest import fitted_law, published_law

    return published_law() if path is None else fitted_law(read_fit(path), str(path))
