"""A text cut into its tokens, each in another colour than its neighbour."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from rich.text import Text

#: As many colours as the style sheet has classes `t0` …; neighbours always differ.
_COLOURS = 5
_TERMINAL_STYLES = ("on #5c3a1e", "on #1e4a5c", "on #3f5c1e", "on #5c1e4a", "on #3a3a6e")


def tokens_html(pieces: Sequence[str]) -> Markup:
    """Tokens as coloured spans. White space stays; line breaks, tabs and other invisible characters get a sign.

    pieces: the text of each token in order; joined they are the text.
    """
    spans = (
        Markup('<span class="t{}">{}</span>').format(index % _COLOURS, _with_signs(piece)) for index, piece in enumerate(pieces)
    )
    return Markup('<div class="tokens">{}</div>').format(Markup("").join(spans))


def token_list(pieces: Sequence[str]) -> Markup:
    """Single tokens side by side, spaces made visible."""
    items = (Markup("<code>{}</code>").format(visible(piece)) for piece in pieces)
    return Markup('<p class="token-list">{}</p>').format(Markup(" ").join(items))


def tokens_text(pieces: Sequence[str]) -> Text:
    """The same for a terminal."""
    text = Text()
    for index, piece in enumerate(pieces):
        text.append(_with_signs(piece), style=f"#f0ece4 {_TERMINAL_STYLES[index % _COLOURS]}")
    return text


def token_words(pieces: Sequence[str]) -> Text:
    """Single tokens side by side for a terminal, spaces made visible."""
    text = Text()
    for index, piece in enumerate(pieces):
        text.append("  " if index else "").append(visible(piece), style=f"#f0ece4 {_TERMINAL_STYLES[index % _COLOURS]}")
    return text


def printable(text: str) -> str:
    """A text that cannot command a terminal: characters that are not shown (escape sequences) become U+FFFD."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


def token(piece: str) -> Markup:
    """One token as a word of code, its spaces visible."""
    return Markup('<span class="token">{}</span>').format(visible(piece))


def visible(piece: str) -> str:
    """One token as a word: no white space in it, a sign for everything that has no picture."""
    return "".join({" ": "·", "\n": "↵", "\t": "→"}.get(character) or _sign(character) for character in piece)


def _with_signs(piece: str) -> str:
    """A token in its text: white space stays, with a sign where it would not be seen."""
    return "".join({"\n": "↵\n", "\t": "→\t"}.get(character) or _sign(character) for character in piece)


def _sign(character: str) -> str:
    """A visible character; for a control character its picture (␛), for another invisible one its number."""
    if character.isprintable():
        return character
    code = ord(character)
    if code <= 0x20 or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)
    return f"⟨U+{code:04X}⟩"
