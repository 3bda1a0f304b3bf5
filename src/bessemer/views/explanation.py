"""The verdict of every edit and filter on a document, as `bessemer explain` prints it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from bessemer.core.metrics import short_number, size
from bessemer.data.corpus.reader import Sighting
from bessemer.data.stages.explain import RECIPE, EditResult, Explanation, Score, TextChange
from bessemer.data.thresholds import display_name
from bessemer.views.elements import tokens_text
from bessemer.views.parts_terminal import listing, literal, section

_MOST_CHANGES = 12
_MOST_CHARACTERS = 160
_PASSES, _FAILS = "green", "bold red"


def show_explanation(explanation: Explanation, pieces: Sequence[str] = ()) -> RenderableType:
    """The verdict, the edits with what they change, and every score beside its limit. pieces: the text in its tokens."""
    parts: list[RenderableType] = [_verdict(explanation)]
    changed = [edit for edit in explanation.edits if edit.changes or any(edit.counts.values())]
    for edit in changed:
        parts += section(f"Edit {edit.name}", _edit(edit))
    unchanged = [edit.name for edit in explanation.edits if edit not in changed]
    if unchanged:
        parts += section("Edits that change nothing", literal(", ".join(unchanged), "dim"))
    if explanation.scores:
        parts += section("Scores", _scores(explanation.scores))
    if pieces:
        parts += section(f"{len(pieces):,} tokens", tokens_text(pieces))
    return Group(*parts)


def show_history(sightings: Iterable[Sighting]) -> RenderableType:
    """What became of a document in each stage."""
    table = listing("Stage", "text", "", " ")
    table.columns[-1].justify = "left"
    for sighting in sightings:
        kept = sighting.side == "documents"
        table.add_row(
            literal(sighting.stage),
            size(len(sighting.row["text"].encode())),
            Text("kept" if kept else "dropped", _PASSES if kept else _FAILS),
            literal("" if kept else sighting.row["reason"]),
        )
    return table


def _verdict(explanation: Explanation) -> Text:
    text = Text()
    if explanation.is_kept:
        return text.append("It is kept.", _PASSES)
    if explanation.is_kept is False:
        first, *others = explanation.reasons[RECIPE]
        text.append("It is dropped: ", _FAILS).append_text(literal(first))
        if others:
            text.append("\nIt breaks as well: ").append_text(literal("; ".join(others)))
        return text
    for preset, reasons in explanation.reasons.items():
        text.append(f"{preset} drops it: ", _FAILS).append_text(literal("; ".join(reasons))).append("\n")
    passed = dict.fromkeys(
        score.preset for score in explanation.scores if score.preset and score.preset not in explanation.reasons
    )
    return text.append("It passes ", _PASSES).append(", ".join(passed)) if passed else text


def _edit(edit: EditResult) -> RenderableType:
    counts = {column.removeprefix(f"{edit.name}_").replace("_", " "): count for column, count in edit.counts.items() if count}
    counted = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
    text = literal(counted, "dim")
    for change in edit.changes[:_MOST_CHANGES]:
        text.append("\n").append_text(_change(change))
    if len(edit.changes) > _MOST_CHANGES:
        text.append(f"\nand {len(edit.changes) - _MOST_CHANGES:,} more changes", "dim")
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
    for score in scores:
        known = "–" if score.value is None else score.value
        value = short_number(known) if isinstance(known, (int, float)) and not isinstance(known, bool) else str(known)
        style = {True: "", False: _FAILS, None: "dim"}[score.passes]
        table.add_row(
            literal(display_name(score.column), style),
            literal(value, style),
            literal(_kept(score)),
            literal(score.preset, "dim"),
            literal(score.description, "dim"),
        )
    return table


def _kept(score: Score) -> str:
    lowest, highest = score.limit
    words = [f"≥ {short_number(lowest)}"] if lowest is not None else []
    return " ".join([*words, *([f"≤ {short_number(highest)}"] if highest is not None else [])])
