"""Tables and lists of facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bessemer.core.figures import label, shown, simple_values
from bessemer.core.report import Column


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
