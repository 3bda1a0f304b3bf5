"""Encodings of text files: detected, and decoded with what was damaged replaced.

UTF-8 where that is possible, UTF-16 and UTF-32, and the code pages of older programs. An encoding is decided by, in this order:
a byte order mark; NUL bytes, which mean UTF-16; valid UTF-8, which other encodings hardly ever are by chance;
`charset_normalizer`, limited to common code pages.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

UTF8 = "utf-8"

#: Byte order marks, the longer first, since UTF-32's begins with UTF-16's; and codecs that skip the mark.
_MARKS = (
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: Bytes that are examined for NUL bytes, and for the code page.
_HEAD, _MOST_LINES_BYTES = 4096, 1 << 16
#: Code pages of Windows and of East Asia, the commonest first: what Excel's "CSV" and Notepad's "ANSI" mean, by country.
_CODE_PAGES = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949", "koi8_r", "mac_roman", "cp850", "cp874"),
)
#: Runs of characters beyond ASCII, Japanese kana, and the share of kana among them from which a text is Japanese.
_BEYOND_ASCII, _KANA, _KANA_SHARE = re.compile(r"[^\x00-\x7f\ufffd]+"), re.compile("[\u3041-\u30fe]"), 0.2
#: Share of characters that a code page does not know from which a text is not in it.
_UNKNOWN = 0.02
#: Turkish's letters beyond ASCII, and those of them that other letters stand for in the Western European page.
_TURKISH, _TURKISH_ALONE = frozenset("ğĞıİşŞçÇöÖüÜâÂîÎûÛ"), frozenset("ğĞıİşŞ")
#: Differences in `charset_normalizer`'s chaos and coherence that are too small to choose a code page by.
_ALIKE = 0.01


def encoding_of(data: bytes, *, is_whole: bool = True) -> str:
    """The name of Python's codec for a text; `UTF8` also for one with a few damaged bytes.

    data: the text, or its beginning, which may end inside a character (`is_whole=False`).
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    if (wide := _utf16(data[:_HEAD])) is not None:
        return wide
    try:
        codecs.getincrementaldecoder(UTF8)().decode(data, final=is_whole)
    except UnicodeDecodeError:
        pass
    else:
        return UTF8
    decoded = data.decode(UTF8, "replace")
    whole = sum(map(len, _BEYOND_ASCII.findall(decoded)))
    damaged = decoded.count("\ufffd") - data.count("\ufffd".encode())
    return UTF8 if whole >= damaged else _code_page(data)


def decoded_text(data: bytes) -> tuple[str, str]:
    """A text without its byte order mark, and the codec that it was read with. Bytes that the codec does not know become
    U+FFFD."""
    name = encoding_of(data)
    return data.decode(name, "replace").removeprefix("\ufeff"), name


def undecodable_line(data: bytes, name: str) -> int | None:
    """The first line with bytes that a codec does not know; None where it knows all."""
    try:
        data.decode(name)
    except UnicodeDecodeError as error:
        return data.count(b"\n", 0, error.start) + 1
    return None


def _utf16(head: bytes) -> str | None:
    """UTF-16 without a mark, by the NUL bytes that ASCII characters have in it on one side; None for anything else."""
    pairs = len(head) // 2
    if not pairs:
        return None
    first, second = head[0 : 2 * pairs : 2].count(0) / pairs, head[1 : 2 * pairs : 2].count(0) / pairs
    if max(first, second) < 0.7 or min(first, second) > 0.05:
        return None
    return "utf-16-le" if second > first else "utf-16-be"


def _code_page(data: bytes) -> str:
    """The code page of a text that is not Unicode, by its lines that are not ASCII.

    Of the code pages that fit about as well as the best one, the commonest is taken: a few words often fit both the Western and
    the Central European one.
    """
    from charset_normalizer import from_bytes

    lines = b"".join(_lines_beyond_ascii(data))
    for name in ("cp932", "euc_jp"):
        # the library takes a few Japanese words for Korean or Chinese
        decoded = lines.decode(name, "replace")
        characters = "".join(_BEYOND_ASCII.findall(decoded))
        is_known = decoded.count("\ufffd") <= _UNKNOWN * len(characters)
        if is_known and len(_KANA.findall(characters)) > _KANA_SHARE * len(characters):
            return name
    # the library finds as much sense in the Western letters of the same bytes
    letters = {character for character in lines.decode("cp1254", "replace") if character > "\x7f" and character.isalpha()}
    if letters <= _TURKISH and len(letters & _TURKISH_ALONE) > 1:
        return "cp1254"
    matches = list(from_bytes(lines, cp_isolation=list(_CODE_PAGES), enable_fallback=False))
    if not matches:
        return _CODE_PAGES[0]
    best = min(matches, key=lambda match: (round(match.chaos, 2), -match.coherence))
    likely = {
        name
        for match in matches
        if match.chaos <= best.chaos + _ALIKE and match.coherence >= best.coherence - _ALIKE
        # code pages that decode the text alike are one match
        for name in (match.encoding, *match.could_be_from_charset)
    }
    return next(name for name in _CODE_PAGES if name in likely)


def _lines_beyond_ascii(data: bytes) -> Iterator[bytes]:
    size = 0
    for line in data.splitlines(keepends=True):
        if not line.isascii():
            yield line[:_MOST_LINES_BYTES]
            size += len(line)
            if size >= _MOST_LINES_BYTES:
                return
