"""Elements of an HTML page: tables, lists of facts, bars, numbers as shades (pictures of matrices, strips, heat maps),
and a text cut into its tokens, each in another colour than its neighbour.

A shade is a colour's opacity, so that one picture fits light and dark pages. Bars are drawn by the style sheet.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.text import Text

from bessemer.core.metrics import label, shown, simple_values
from bessemer.core.report import Column


def render_page(template: str, styles: Sequence[str], **values: Any) -> str:
    """A whole page from a template and style sheets of this package. Every text from outside is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    files = resources.files("bessemer.views")
    page = environment.from_string(files.joinpath(template).read_text(encoding="utf-8"))
    style = Markup("".join(files.joinpath(sheet).read_text(encoding="utf-8") for sheet in styles))
    return page.render(style=style, **values)


def bar_html(share: float, rest: float = 0.0) -> Markup:
    """A horizontal bar of `share` of its width (0 … 1), followed by a hatched one of `rest`."""
    parts = Markup('<i style="width:{:.2f}%"></i>').format(100 * max(share, 0.0))
    if rest > 0:
        parts += Markup('<i class="gone" style="width:{:.2f}%"></i>').format(100 * rest)
    return Markup('<span class="bar" aria-hidden="true">{}</span>').format(parts)


def measured(share: float, figure: str) -> Markup:
    """A figure behind its bar; in a table all bars begin at one place."""
    return Markup('<span class="measured">{}<span>{}</span></span>').format(bar_html(share), figure)


def lead(text: str) -> Markup:
    """The paragraph that introduces a section."""
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
    return Markup('<div class="scroll" tabindex="0"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(
        head, body
    )


def _numeric(column: Column) -> Markup:
    return Markup(' class="number"') if column.numeric else Markup("")


def facts_html(values: Mapping[str, Any]) -> Markup:
    """Metrics as a list of names and values, in the units that their names tell; nested values are left out."""
    rows = (Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(label(k), shown(k, v)) for k, v in simple_values(values).items())
    return Markup('<dl class="facts">{}</dl>').format(Markup("").join(rows))


#: The colour of what is positive, and of what is negative; visible on light and on dark.
POSITIVE, NEGATIVE = (214, 84, 26), (45, 125, 190)
#: Weights are shaded by their root: of weights that sum to 1, most are small.
WEIGHT_EXPONENT = 0.5
_CELL, _LEFT, _TOP = 16, 26, 16
#: Width of a small letter.
_LETTER = 5.2
#: Most rows or columns that are all numbered; of more, every second, fifth or tenth is.
_LABELLED_ROWS = 40


def weights_picture(weights_TT: np.ndarray) -> str:
    """A matrix of numbers from 0 to 1 as a picture of one pixel each: a `data:` address of a PNG."""
    shades = np.clip(np.nan_to_num(weights_TT), 0, 1) ** WEIGHT_EXPONENT
    return _address(np.rint(255 * shades).astype(np.uint8), _palette(POSITIVE))


def signed_picture(values: np.ndarray, limit: float | None = None) -> str:
    """A matrix of numbers of both signs, full shade at ±limit (the largest when None): a `data:` address of a PNG."""
    values = np.nan_to_num(np.atleast_2d(values))
    limit = limit or float(np.abs(values).max()) or 1.0
    shades = np.rint(127 * np.clip(values / limit, -1, 1)).astype(np.int64)
    return _address((shades + 128).astype(np.uint8), _signed_palette())


def strip(values_C: np.ndarray, limit: float | None = None) -> Markup:
    """A vector as a row of shades, first channel on the left."""
    return Markup('<img class="strip" alt="" src="{}">').format(signed_picture(values_C, limit))


def heat_map(
    values_LH: np.ndarray,
    *,
    title: str,
    shown: Callable[[float], str],
    rows: str = "layer",
    columns: str = "head",
    marked: Sequence[tuple[int, int]] = (),
    limit: float | None = None,
    shades_LH: np.ndarray | None = None,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
) -> Markup:
    """A matrix as cells, each with its number in its title; negative ones in the other colour, missing ones empty.

    limit: number of the full shade; None: the largest absolute one. marked: cells with a frame. shades_LH: 0 to 1, where shades
    do not follow the numbers. row_names, column_names: where they are not 0, 1, 2, ….
    """
    count, width = values_LH.shape
    known = np.abs(values_LH[np.isfinite(values_LH)])
    limit = limit or float(known.max(initial=0.0)) or 1.0
    shades_LH = np.abs(values_LH) / limit if shades_LH is None else shades_LH
    left = max(_LEFT, 8 + round(_LETTER * max(map(len, row_names), default=0))) if row_names else _LEFT
    parts = []
    for row, column in np.ndindex(count, width):
        value, x, y = float(values_LH[row, column]), left + column * _CELL, _TOP + row * _CELL
        name = row_names[row] if row_names else f"{rows} {row}"
        name += f", {columns} {column_names[column] if column_names else column}"
        if math.isnan(value):
            parts.append(
                Markup('<rect class="none" x="{}" y="{}" width="14" height="14"><title>{}: none</title></rect>').format(
                    x, y, name
                )
            )
            continue
        style = f"fill:rgb{POSITIVE if value >= 0 else NEGATIVE};fill-opacity:{min(shades_LH[row, column], 1):.3f}".replace(
            " ", ""
        )
        frame = Markup(' class="marked"') if (row, column) in marked else ""
        parts.append(
            Markup('<rect{} x="{}" y="{}" width="14" height="14" style="{}"><title>{}: {}</title></rect>').format(
                frame, x, y, style, name, shown(value)
            )
        )
    both = ((count, left - 6, _TOP + 11, row_names), (width, left + 7, _TOP - 5, column_names))
    for axis, (size, x0, y0, names) in enumerate(both):
        # cells that the longest name takes
        needed = (max(map(len, names)) * _LETTER + 6) // _CELL + 1 if names and axis == 1 else 1
        every = next(step for step in (1, 2, 5, 10, 50, 10**9) if size / step <= _LABELLED_ROWS and step >= needed)
        for index in range(0, size, every):
            x, y = (x0, y0 + index * _CELL) if axis == 0 else (x0 + index * _CELL, y0)
            anchor, text = "end" if axis == 0 else "middle", names[index] if names else index
            parts.append(Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, text))
    across, down = left + width * _CELL, _TOP + count * _CELL
    return Markup(
        '<figure class="heat"><figcaption>{}</figcaption>'
        '<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">{}</svg></figure>'
    ).format(title, across, down, across, down, f"{title}, by {rows} (down) and {columns} (across)", Markup("").join(parts))


def logarithmic_shades(values_RC: np.ndarray) -> np.ndarray:
    """Shades by logarithm: 0.08 for the smallest number, 1 for the largest, 0 for what has no logarithm."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.log(values_RC)
    finite = np.isfinite(logarithms)
    if not finite.any():
        return np.zeros_like(values_RC)
    low, high = logarithms[finite].min(), logarithms[finite].max()
    return np.where(finite, 0.08 + 0.92 * (logarithms - low) / max(high - low, 1e-9), 0.0)


def _palette(colour: tuple[int, int, int]) -> np.ndarray:
    """256 shades of a colour, (256, 4): red, green, blue, opacity."""
    return np.column_stack((np.tile(colour, (256, 1)), np.arange(256))).astype(np.uint8)


def _signed_palette() -> np.ndarray:
    """Shades -128 … 127 around 128."""
    shades = np.arange(-128, 128)
    colours = np.where(shades[:, None] < 0, NEGATIVE, POSITIVE)
    return np.column_stack((colours, np.minimum(2 * np.abs(shades), 255))).astype(np.uint8)


def _address(pixels: np.ndarray, palette: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(pixels, palette)).decode("ascii")


def png(pixels: np.ndarray, palette: np.ndarray) -> bytes:
    """A picture of indices into a palette, (height, width) uint8 and (256, 4) uint8, as PNG (ISO/IEC 15948)."""
    height, width = pixels.shape
    # before each line its filter: none
    lines = np.column_stack((np.zeros(height, np.uint8), pixels))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette[:, :3].tobytes()),
        (b"tRNS", palette[:, 3].tobytes()),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    parts = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


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
