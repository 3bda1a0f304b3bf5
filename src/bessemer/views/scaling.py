"""What `bessemer scaling` and `bessemer sweep` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rich.console import Group, RenderableType

from bessemer.core.metrics import duration, percent, short_count
from bessemer.scaling.laws.fit import Fit, Interval
from bessemer.scaling.laws.isoflop import Frontier, IsoFlop, IsoFlopBias, PowerLaw
from bessemer.scaling.laws.parametric import ParametricLaw
from bessemer.scaling.planner import describe
from bessemer.scaling.suggest import LawInUse, Prediction, Suggestion
from bessemer.views.parts_terminal import listing, literal, section

#: Rows of the table of a fit: a name, and the number of the law.
_NUMBERS: tuple[tuple[str, Any], ...] = (
    ("E", lambda law: law.E),
    ("A", lambda law: law.A),
    ("B", lambda law: law.B),
    ("α", lambda law: law.alpha),
    ("β", lambda law: law.beta),
    ("N ∝ C^a: a", lambda law: law.parameters_exponent),
)
#: How parameters are counted, in words.
COUNTS = {
    "all": "all weights that a token meets, embedding and head among them",
    "non-embedding": "weights that a token meets, without the embedding and the head",
    "as given": "as the CSV counts it",
}


def show_fits(fits: Sequence[Fit], confidence: float, counting: str) -> RenderableType:
    """The laws side by side, each number with its bootstrap interval."""
    first = fits[0]
    rows = [
        [name, *(_with_interval(number(fit.law), fit.interval(number, confidence)) for fit in fits)]
        for name, number in _NUMBERS
    ]
    rows.append(["RMS of log residuals", *(percent(fit.root_mean_square) for fit in fits)])
    table = listing("", *(_METHODS[fit.method] for fit in fits), rows=rows)
    words = [
        f"L = E + A/N^α + B/D^β on {len(first.points)} points; L is {first.metric}",
        f"N: {counting}",
        f"brackets: {_share(confidence)} of {len(first.resamples)} resamples of the residuals, which takes the noise to be "
        "alike at all points",
    ]
    return Group(*(literal(line) for line in words), *section("The law", table))


_METHODS = {"huber": "Huber, L-BFGS", "grid": "grid, NNLS"}


def show_isoflop(isoflop: IsoFlop, bias: IsoFlopBias | None) -> RenderableType:
    """The lowest points of the parabolas, the exponent, and the method's bias on these sizes."""
    rows = [
        (f"{parabola.flops:.3g}", str(len(parabola.points)), short_count(parabola.parameters), f"{parabola.loss:.4g}")
        for parabola in isoflop.parabolas
    ]
    table = listing("FLOPs", "points", "N of the lowest loss", "loss", rows=rows)
    lines = [f"N ∝ C^a: a = {_power(isoflop.parameters)}"]
    if bias is None:
        lines.append("parabolas are biased where α ≠ β; by how much is not known: the law gives none on these sizes")
    else:
        lines.append(
            "parabolas are biased where α ≠ β: on these sizes, without noise, they would miss the law's a by "
            f"{bias.exponent:+.3f} and give {bias.size:.2f} times its N at the largest compute"
        )
    lines += [f"left out: {reason}" for reason in isoflop.left_out]
    return Group(*section("IsoFLOP parabolas", table), *map(literal, lines))


def show_frontier(frontier: Frontier, points: int, confidence: float, counting: str) -> RenderableType:
    """The power laws of points that are each the best of their compute."""
    freedom = frontier.parameters.degrees_of_freedom
    lines = [
        f"{points} points, each taken to be the best of its compute; N: {counting}",
        f"N ∝ C^a: a = {_power(frontier.parameters)}",
        f"D ∝ C^b: b = {_power(frontier.tokens)}",
    ]
    if frontier.loss is not None:
        lines.append(f"L = {frontier.loss.E:.4g} + {frontier.loss.K:.4g} / C^{frontier.loss.gamma:.3g}")
    else:
        lines.append("L of C has three numbers, and these points are too few for it: no loss is predicted")
    if freedom < 6:
        lines.append(
            f"{points} points leave {freedom} {'degree' if freedom == 1 else 'degrees'} of freedom: the {_share(confidence)} "
            "interval holds only if each really is the optimum of its budget and the line is straight, and nothing in them can "
            "show either"
        )
    return Group(*map(literal, lines))


def show_suggestion(suggestion: Suggestion, confidence: float) -> RenderableType:
    """A run for a budget."""
    model, settings = suggestion.model, suggestion.settings
    lines = [
        f"law: {suggestion.law.said}",
        f"parameters: {suggestion.parameters:,} ({_counted(suggestion.law)}): "
        f"{model.num_hidden_layers} layers of {model.hidden_size:,}, vocabulary {model.vocab_size:,}",
        f"tokens: {suggestion.tokens:,} ({suggestion.tokens / suggestion.parameters:.1f} a parameter), "
        f"{suggestion.flops:.3g} FLOPs (6 N D)",
        f"batch: {settings.batch_size:,} rows of {settings.context_length:,} tokens; learning rate {settings.learning_rate:g}, "
        f"β₂ {settings.beta2:g}, warm-up {short_count(settings.warmup_tokens or 0)} tokens, decay over the last 10 %",
        f"predicted loss{_unit(suggestion.law)}: {suggestion.loss:.4g}, {_share(confidence)} of "
        f"{_spread(suggestion.law)} between {suggestion.interval.low:.4g} and {suggestion.interval.high:.4g}",
    ]
    if suggestion.extrapolation is not None:
        lines.append(f"extrapolated: {suggestion.extrapolation}")
    if suggestion.plan is not None:
        plan = suggestion.plan
        days = plan.days(suggestion.tokens)
        lines.append(
            f"on {plan.candidate.layout.world_size} × {plan.job.card.name}: {duration(days * 86_400)} "
            f"({days:,.2f} days), {describe(plan)}, MFU {percent(plan.model_flops_utilisation)}; predicted, not measured"
        )
    return Group(*map(literal, lines))


def show_prediction(prediction: Prediction, confidence: float) -> RenderableType:
    """The predicted loss of one run."""
    lines = [
        f"law: {prediction.law.said}",
        f"N {prediction.parameters:,} ({_counted(prediction.law)}), D {prediction.tokens:,} tokens, "
        f"{prediction.flops:.3g} FLOPs: {prediction.relative_flops:.3g} times the compute of the largest point of the law",
        f"predicted loss{_unit(prediction.law)}: {prediction.loss:.4f}, {_share(confidence)} of "
        f"{_spread(prediction.law)} between {prediction.interval.low:.4f} and {prediction.interval.high:.4f}",
    ]
    return Group(*map(literal, lines))


def _unit(law: LawInUse) -> str:
    return "" if law.metric == "loss" else f" ({law.metric})"


def _counted(law: LawInUse) -> str:
    return "all" if law.count == "all" else "without embeddings"


def _spread(law: LawInUse) -> str:
    return "runs" if law.fit is not None else "the law’s resamples"


def prediction_values(prediction: Prediction, confidence: float) -> dict[str, Any]:
    """A prediction as plain values."""
    return {
        "law": prediction.law.said,
        "metric": prediction.law.metric,
        "parameters": prediction.parameters,
        "tokens": prediction.tokens,
        "flops": prediction.flops,
        "relative_flops": prediction.relative_flops,
        "loss": prediction.loss,
        "confidence": confidence,
        "interval": [prediction.interval.low, prediction.interval.high],
    }


def show_sweep(rows: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> RenderableType:
    """One row a member, by the values that vary, and means over seeds; a problem is said below the table."""
    names = _short_names(varied)
    table = listing(*(names or ["run"]), "N", "tokens", "bits per byte", "validation loss", "time")
    for row in rows:
        if row["status"] == "failed":
            cells = ["failed", *[""] * 4]
        else:
            cells = [
                "" if row["parameters"] is None else short_count(row["parameters"]),
                "" if row["tokens"] is None else short_count(row["tokens"]),
                *(_loss(row[name]) for name in ("bits_per_byte", "validation_loss")),
                "" if row["seconds"] is None else duration(row["seconds"]),
            ]
        table.add_row(*map(literal, [*([str(row[key]) for key in varied] or [row["run"]]), *cells]))
    parts: list[RenderableType] = [table]
    if "seed" in varied:
        parts += section("Over seeds", _over_seeds(rows, [key for key in varied if key != "seed"]))
    parts += [literal(f"{row['run']}: {row['problem']}") for row in rows if row["problem"]]
    return Group(*parts)


def _over_seeds(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> RenderableType:
    by_setting = [
        [*values, str(len(losses)), _loss(fmean(losses)), f"{stdev(losses):.2g}" if len(losses) > 1 else "–"]
        for values, losses in losses_by(rows, keys).items()
    ]
    return listing(*_short_names(keys), "seeds", "mean loss", "standard deviation", rows=by_setting)


def losses_by(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[tuple[str, ...], list[float]]:
    """The losses of members that have these settings alike."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row["loss"] is not None:
            groups.setdefault(tuple(str(row[key]) for key in keys), []).append(float(row["loss"]))
    return groups


def sweep_curves(
    rows: Sequence[Mapping[str, Any]], varied: Sequence[str]
) -> tuple[str, dict[str, tuple[list[float], list[float]]]] | None:
    """(the first setting whose values are numbers, curves of the mean loss over it by the other settings); None where fewer
    than two of its values have a loss."""
    axis = next((key for key in varied if key != "seed" and all(_number(row[key]) is not None for row in rows)), None)
    if axis is None:
        return None
    others = [key for key in varied if key not in (axis, "seed")]
    curves: dict[str, tuple[list[float], list[float]]] = {}
    means = {values: fmean(losses) for values, losses in losses_by(rows, [axis, *others]).items()}
    for (x, *rest), y in sorted(means.items(), key=lambda item: float(item[0][0])):
        label = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in zip(others, rest, strict=True))
        xs, ys = curves.setdefault(label, ([], []))
        xs.append(float(x))
        ys.append(y)
    return (axis, curves) if any(len(xs) > 1 for xs, _ in curves.values()) else None


def _short_names(keys: Sequence[str]) -> list[str]:
    """Settings without their stage, where that is enough to tell them apart."""
    short = [key.rpartition(".")[2] for key in keys]
    return short if len(set(short)) == len(short) else list(keys)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _with_interval(value: float, between: Interval) -> str:
    return f"{value:.4g} [{between.low:.4g}, {between.high:.4g}]"


def _share(confidence: float) -> str:
    return f"{100 * confidence:g} %"


def _power(law: PowerLaw) -> str:
    return f"{law.exponent:.3f} [{law.low:.3f}, {law.high:.3f}]"


def fit_values(fit: Fit, confidence: float) -> dict[str, Any]:
    """A fit as plain values, for JSON."""

    def entry(number: Any) -> dict[str, float]:
        between = fit.interval(number, confidence)
        return {"value": float(number(fit.law)), "low": between.low, "high": between.high}

    names: dict[str, Any] = {
        **{name: (lambda law, name=name: getattr(law, name)) for name in ParametricLaw.__dataclass_fields__},
        "parameters_exponent": lambda law: law.parameters_exponent,
    }
    return {"method": fit.method, "root_mean_square": fit.root_mean_square} | {
        name: entry(number) for name, number in names.items()
    }
