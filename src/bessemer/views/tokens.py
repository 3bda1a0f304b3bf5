"""A text cut into its tokens, each in another colour than its neighbour."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from rich.text import Text

#: As many colours as the style sheet has classes `t0` …; neighbours always differ.
_COLOURS = 5
_TERMINAL_STYLES = ("on #5c3a1e", "on #1e4a5c", "on #3f5c1e", "on #5c1e4a", "on #3a3a6e")


def tokens_html(pieces: Sequence[str]) -> Markup:
    """Tokens as coloured spans. White space stays; a line break is also shown as a sign, or its token would be invisible.

    pieces: the text of each token in order; joined they are the text.
    """
    spans = (
        Markup('<span class="t{}">{}</span>').format(index % _COLOURS, piece.replace("\n", "↵\n"))
        for index, piece in enumerate(pieces)
    )
    return Markup('<div class="tokens">{}</div>').format(Markup("").join(spans))


def token_list(pieces: Sequence[str]) -> Markup:
    """Single tokens side by side, spaces made visible."""
    items = (Markup("<code>{}</code>").format(_visible(piece)) for piece in pieces)
    return Markup('<p class="token-list">{}</p>').format(Markup(" ").join(items))


def tokens_text(pieces: Sequence[str]) -> Text:
    """The same for a terminal."""
    text = Text()
    for index, piece in enumerate(pieces):
        text.append(printable(piece).replace("\n", "↵\n"), style=f"#f0ece4 {_TERMINAL_STYLES[index % _COLOURS]}")
    return text


def printable(text: str) -> str:
    """A text that cannot command a terminal: characters that are not shown (escape sequences) become U+FFFD."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


def _visible(piece: str) -> str:
    return piece.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
