"""Report of the model stage: what the untrained network's parts weigh and what a token costs."""

from __future__ import annotations

from collections.abc import Sequence

from bessemer.core.figures import short_count
from bessemer.core.report import Cell, Column, Facts, KeyFigure, Metrics, Part, Section, StageReport, Table, Text

#: A model below this many parameters learns the look of its texts and little of what they say.
_SMALL = 100_000_000


def report(stage: StageReport) -> Section:
    """The model's figures and parts."""
    parts: list[Part] = [
        Text("The network before it has seen any text: what its parts weigh and what a token costs.", lead=True),
        Facts(stage.metrics),
        layers_table(stage.metrics.get("layers", ())),
    ]
    return Section(stage.titled("Model"), parts)


def summary_line(metrics: Metrics) -> str:
    """The number of parameters."""
    return f"{metrics['parameters']:,} parameters"


def sentences(stage: StageReport) -> list[str]:
    """The model's size, what it was trained on, and for a small one what it cannot do."""
    parameters = stage.metrics["parameters"]
    is_alone = len(stage.run.of_kind("model")) == 1
    tokens = sum(one.metrics.get("tokens") or 0 for one in stage.run.of_kind("pretrain")) if is_alone else 0
    lines = [f"{stage.titled('Model')}: {parameters:,} parameters{f', trained on {tokens:,} tokens' if tokens else ''}."]
    if parameters < _SMALL:
        answers = " and answers the questions that it was tuned on" if stage.run.of_kind("sft") else ""
        lines.append(
            f"At this size it writes in the style of its corpus{answers}; it does not know facts, reason, or answer "
            f"{'anything else' if answers else 'questions'} reliably."
        )
    return lines


def key_figures(stage: StageReport) -> list[KeyFigure]:
    """The number of parameters."""
    return [
        KeyFigure(
            value=short_count(stage.metrics["parameters"]),
            label="parameters" if stage.name == stage.kind else f"parameters: {stage.name}",
        )
    ]


def next_steps(stage: StageReport) -> list[str]:
    """Serving the run's model."""
    return [f"bessemer serve {stage.run.name}"] if (stage.run.folder / "model").exists() else []


def layers_table(layers: Sequence[Metrics]) -> Table:
    """A model's parts: `part`, `count`, `shapes`, `parameters`, as the model stage reports them."""
    total = sum(layer["parameters"] for layer in layers) or 1
    rows = [
        (
            layer["part"],
            f"{layer['count']:,}",
            ", ".join(" × ".join(map(str, shape)) for shape in layer["shapes"]),
            Cell(f"{layer['parameters']:,}", share=layer["parameters"] / total),
        )
        for layer in layers
    ]
    columns = [Column("Part"), Column("Count", True), Column("Shapes of each"), Column("Parameters", True)]
    return Table(columns, rows)
