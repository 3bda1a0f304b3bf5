"""Tables and lists of facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from bessemer.core.progress import duration, size
from bessemer.views.bars import measured
from bessemer.views.figures import label, shown, simple_values
from bessemer.views.run_data import StageRun


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether it holds numbers (set to the right)."""

    heading: str
    numeric: bool = False


def lead(text: str) -> Markup:
    """The paragraph that says what is seen."""
    return Markup('<p class="lead">{}</p>').format(text)


def soft(text: str) -> Markup:
    """A remark."""
    return Markup('<p class="soft">{}</p>').format(text)


def table(columns: Sequence[Column], rows: Sequence[Sequence[str | Markup]], classes: Sequence[str] = ()) -> Markup:
    """An HTML table; text is escaped, `Markup` is taken as it is. classes: of the rows, where they have any."""
    head = Markup("").join(Markup('<th scope="col"{}>{}</th>').format(_numeric(column), column.heading) for column in columns)
    body = Markup("").join(
        Markup("<tr{}>{}</tr>").format(
            Markup(' class="{}"').format(name) if name else "",
            Markup("").join(
                Markup("<td{}>{}</td>").format(_numeric(column), cell) for column, cell in zip(columns, row, strict=True)
            ),
        )
        for row, name in zip(rows, classes or [""] * len(rows), strict=True)
    )
    return Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(head, body)


def _numeric(column: Column) -> Markup:
    return Markup(' class="number"') if column.numeric else Markup("")


def facts(values: Mapping[str, Any]) -> Markup:
    """Metrics as a list of names and values, in the units that their names tell; nested values are left out."""
    rows = (Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(label(k), shown(k, v)) for k, v in simple_values(values).items())
    return Markup('<dl class="facts">{}</dl>').format(Markup("").join(rows))


def stages_table(stages: Sequence[StageRun]) -> Markup:
    """Every stage with the time and memory that it took when it was made, as bars."""
    longest = max((stage.seconds for stage in stages), default=0) or 1
    largest = max((stage.peak_memory_bytes or 0 for stage in stages), default=0) or 1
    rows = [
        (
            Markup("<b>{}</b>").format(stage.name),
            stage.summary,
            measured(stage.seconds / longest, duration(stage.seconds)),
            measured(stage.peak_memory_bytes / largest, size(stage.peak_memory_bytes)) if stage.peak_memory_bytes else "–",
        )
        for stage in stages
    ]
    return table([Column("Stage"), Column("What it made"), Column("Time", True), Column("Peak memory", True)], rows)


def layers_table(layers: Sequence[Mapping[str, Any]]) -> Markup:
    """A model's parts: `part`, `count`, `shapes`, `parameters`, as the model stage reports them."""
    total = sum(layer["parameters"] for layer in layers) or 1
    rows = [
        (
            layer["part"],
            f"{layer['count']:,}",
            ", ".join(" × ".join(map(str, shape)) for shape in layer["shapes"]),
            measured(layer["parameters"] / total, f"{layer['parameters']:,}"),
        )
        for layer in layers
    ]
    return table([Column("Part"), Column("Count", True), Column("Shapes of each"), Column("Parameters", True)], rows)
