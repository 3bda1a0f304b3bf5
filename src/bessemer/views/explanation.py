"""What every edit and filter thinks of a document, for a terminal: what `bessemer explain` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from bessemer.core.metrics import short_number, size
from bessemer.data.corpus.reader import Sighting
from bessemer.data.stages.explain import RECIPE, EditResult, Explanation, Score, TextChange
from bessemer.data.thresholds import display_name
from bessemer.views.parts_terminal import listing, literal, section
from bessemer.views.tokens import tokens_text

_MOST_CHANGES = 12
_MOST_CHARACTERS = 160
_PASSES, _FAILS = "green", "bold red"


def show_explanation(found: Explanation, pieces: Sequence[str] = ()) -> RenderableType:
    """The verdict, the edits with what they change, and every score beside its limit. pieces: the text in its tokens."""
    parts: list[RenderableType] = [_verdict(found)]
    changed = [one for one in found.edits if one.changes or any(one.counts.values())]
    for one in changed:
        parts += section(f"Edit {one.name}", _edit(one))
    unchanged = [one.name for one in found.edits if one not in changed]
    if unchanged:
        parts += section("Edits that change nothing", literal(", ".join(unchanged), "dim"))
    if found.scores:
        parts += section("Scores", _scores(found.scores))
    if pieces:
        parts += section(f"{len(pieces):,} tokens", tokens_text(pieces))
    return Group(*parts)


def show_history(sightings: Iterable[Sighting]) -> RenderableType:
    """What became of a document in each stage."""
    table = listing("Stage", "text", "", " ")
    table.columns[-1].justify = "left"
    for one in sightings:
        kept = one.side == "documents"
        table.add_row(
            literal(one.stage),
            size(len(one.row["text"].encode())),
            Text("kept" if kept else "dropped", _PASSES if kept else _FAILS),
            literal("" if kept else one.row["reason"]),
        )
    return table


def _verdict(found: Explanation) -> Text:
    text = Text()
    if found.is_kept:
        return text.append("It is kept.", _PASSES)
    if found.is_kept is False:
        first, *others = found.reasons[RECIPE]
        text.append("It is dropped: ", _FAILS).append_text(literal(first))
        if others:
            text.append("\nIt breaks as well: ").append_text(literal("; ".join(others)))
        return text
    for preset, reasons in found.reasons.items():
        text.append(f"{preset} drops it: ", _FAILS).append_text(literal("; ".join(reasons))).append("\n")
    passed = dict.fromkeys(one.preset for one in found.scores if one.preset and one.preset not in found.reasons)
    return text.append("It passes ", _PASSES).append(", ".join(passed)) if passed else text


def _edit(one: EditResult) -> RenderableType:
    counts = {column.removeprefix(f"{one.name}_").replace("_", " "): count for column, count in one.counts.items() if count}
    counted = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
    text = literal(counted, "dim")
    for change in one.changes[:_MOST_CHANGES]:
        text.append("\n").append_text(_change(change))
    if len(one.changes) > _MOST_CHANGES:
        text.append(f"\nand {len(one.changes) - _MOST_CHANGES:,} more changes", "dim")
    return text


def _change(change: TextChange) -> Text:
    """`… left [-before-] {+after+} right`, in colour; line ends are seen, and long pieces are cut in the middle."""
    text = literal(_on_a_line(change.left), "dim")
    if change.before:
        text.append_text(literal(f"[-{_on_a_line(change.before)}-]", "red"))
    if change.after:
        text.append_text(literal(f"{{+{_on_a_line(change.after)}+}}", "green"))
    return text.append_text(literal(_on_a_line(change.right), "dim"))


def _on_a_line(text: str) -> str:
    text = text.replace("\n", "↵")
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def _scores(scores: Sequence[Score]) -> RenderableType:
    """Every score; what breaks its limit is red."""
    table = listing("Score", "value", "kept", "preset", "says")
    for column in table.columns[2:]:
        column.justify = "left"
    for one in scores:
        known = "–" if one.value is None else one.value
        value = short_number(known) if isinstance(known, (int, float)) and not isinstance(known, bool) else str(known)
        style = {True: "", False: _FAILS, None: "dim"}[one.passes]
        table.add_row(
            literal(display_name(one.column), style),
            literal(value, style),
            literal(_kept(one)),
            literal(one.preset, "dim"),
            literal(one.description, "dim"),
        )
    return table


def _kept(one: Score) -> str:
    lowest, highest = one.limit
    words = [f"≥ {short_number(lowest)}"] if lowest is not None else []
    return " ".join([*words, *([f"≤ {short_number(highest)}"] if highest is not None else [])])
