"""Report data for a terminal: the elements of every printed view, and each kind of part that has a printed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bessemer.core import report
from bessemer.core.metrics import label, shown, simple_values
from bessemer.core.report import Answer, Cell, Metrics
from bessemer.views.elements import printable, token_words, tokens_text

HEADING = "bold #d9622b"
_BAR_STYLE = "#d9622b"
_BAR_WIDTH = 20


def show_section(part: report.Section) -> list[RenderableType]:
    """A section of the report: its heading and the parts that have a printed form."""
    return section(part.title, Group(*show_parts(part.parts)))


def show_parts(parts: Sequence[report.Part]) -> list[RenderableType]:
    """Parts one after the other. Curves, histograms, heat maps and samples are left out: a page shows them."""
    return [drawn for part in parts for drawn in _show(part)]


def _show(part: report.Part) -> list[RenderableType]:
    match part:
        case report.Heading(text):
            return [literal(f"\n{text}", "bold")]
        case report.Text(text) | report.Verbatim(text):
            return [literal(text)]
        case report.Facts(values):
            return [facts_text(values)]
        case report.Table():
            return [_table(part)]
        case report.Tokens(pieces, listed):
            return [token_words(pieces) if listed else tokens_text(pieces)]
        case report.Documents(documents):
            return [document_text(piece) for piece in documents]
        case report.Answers(given):
            return [answers_text(given)]
        case report.Folded(summary, parts):
            words = summary if isinstance(summary, str) else "  ".join(f"{piece.text}{piece.remark}" for piece in summary)
            return section(words, Group(*show_parts(parts)))
    return []


def _table(part: report.Table) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in part.columns:
        table.add_column(literal(column.heading), justify="right" if column.numeric else "left")
    for row in part.rows:
        table.add_row(*map(_cell, row))
    return table


def _cell(cell: str | Cell) -> Text:
    if isinstance(cell, str):
        return literal(cell)
    text = literal(cell.text, "bold" if cell.strong else "yellow" if cell.warning else "")
    if cell.share is not None:
        drawn = Text().append_text(bar_text(cell.share))
        drawn.pad_right(_BAR_WIDTH - len(drawn))
        text = drawn.append_text(literal(f" {cell.text}" if cell.text else ""))
    return text.append_text(literal(f" {cell.remark}", "dim")) if cell.remark else text


def answers_text(given: Sequence[Answer]) -> Table:
    """Questions with the expected answer and the model's; those it was trained on are named as memorised."""
    table = Table.grid(padding=(0, 2))
    for answer in given:
        table.add_row(
            literal("question", "dim"), literal(answer.question, "bold"), literal("memorised" if answer.held_in else "", "dim")
        )
        table.add_row(literal("expected", "dim"), literal(answer.expected), "")
        table.add_row(literal(answer.model or "model", "dim"), literal(answer.answer, "green" if answer.correct else ""), "")
        table.add_row("", "", "")
    return table


def document_text(document: report.Document) -> RenderableType:
    """A document's source, id, the reason why it was dropped, and its text."""
    return Group(
        literal(" · ".join(value for value in (document.source, document.id, document.reason) if value)),
        literal(document.text, "dim"),
    )


def facts_text(metrics: Metrics) -> Table:
    """Metrics as names and values; nested values are left out."""
    table = Table.grid(padding=(0, 2))
    for name, value in simple_values(metrics).items():
        table.add_row(literal(label(name), "dim"), literal(shown(name, value)))
    return table


def literal(text: str, style: str = "") -> Text:
    """A text from outside, taken literally: neither rich's markup nor the terminal's escapes mean anything in it."""
    return Text(printable(text), style)


def section(title: str, body: RenderableType) -> list[RenderableType]:
    """A heading, and what stands under it."""
    return [literal(f"\n{title}", HEADING), Padding(body, (0, 0, 0, 2))]


def listing(first: str, *columns: str, rows: Iterable[Sequence[RenderableType]] = ()) -> Table:
    """A table with these headings and rows; all columns but the first are set to the right where they have a heading.

    A text in a row is taken literally.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(literal(first))
    for column in columns:
        table.add_column(literal(column), justify="right" if column else "left")
    for row in rows:
        table.add_row(*(literal(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def bar_text(share: float) -> Text:
    """A bar of a share of its place, 0 … 1."""
    return Text("━" * max(round(share * _BAR_WIDTH), 1), _BAR_STYLE)
