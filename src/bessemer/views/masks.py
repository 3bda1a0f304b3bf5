"""What is learnt of rows, for a terminal: tokens side by side, learnt ones in colour, end tokens in another."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from bessemer.posttraining.data.mask import MaskedToken, MaskPreview
from bessemer.views.elements import printable, visible

#: Styles of learnt tokens in turn, so that neighbours differ, of end tokens, and of the others.
_LEARNT = ("#f0ece4 on #1e5c3a", "#f0ece4 on #2f7a52")
_END, _CONTEXT = "bold #1b1b1b on #e8b04a", "dim"
#: Signs around what is learnt, and behind an end token, where there are no colours.
OPENED, CLOSED, ENDED = "⟦", "⟧", "■"


def show_masks(preview: MaskPreview) -> RenderableType:
    """A preview: its figures, a legend, and the rows that are shown."""
    legend = Text.assemble(
        ("context", _CONTEXT), "  ", (f"{OPENED}learnt{CLOSED}", _LEARNT[0]), "  ", (f"end token{ENDED}", _END)
    )
    parts: list[RenderableType] = [*(Text(printable(sentence)) for sentence in preview.sentences), legend]
    for row in preview.rows:
        for number, example in enumerate(row.examples, start=1):
            of = f", example {number} of {len(row.examples)}" if len(row.examples) > 1 else ""
            parts += [Text(f"\n{row.place}{of}", style="bold"), example_text(example)]
        if row.reason:
            parts += [Text(f"\n{row.place}", style="bold"), Text(f"left out: {printable(row.reason)}")]
    return Group(*parts)


def example_text(example: Sequence[MaskedToken]) -> Text:
    """The tokens of an example."""
    text = Text()
    was_learnt = False
    for number, token in enumerate(example):
        if token.is_learnt != was_learnt:
            text.append(OPENED if token.is_learnt else CLOSED, style="bold")
            was_learnt = token.is_learnt
        style = _END if token.is_end else _LEARNT[number % 2] if token.is_learnt else _CONTEXT
        text.append(_shown(token), style=style)
    if was_learnt:
        text.append(CLOSED, style="bold")
    return text


def _shown(token: MaskedToken) -> str:
    """A token's text: as it is in the context, with signs for white space where it is learnt."""
    if token.is_end:
        return visible(token.text) + ENDED
    return visible(token.text).replace("·", " ").replace("↵", "↵\n") if token.is_learnt else printable(token.text)
