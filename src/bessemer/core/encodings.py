"""Which encoding a text was saved in: UTF-8 where that is possible, UTF-16 and UTF-32, and the code pages of older programs.

A byte order mark decides; then NUL bytes, which tell UTF-16; then whether the bytes are UTF-8, which other encodings hardly
ever are by chance; then `charset_normalizer`, asked for the code pages that people save tables and texts in.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

UTF8 = "utf-8"

#: Marks, the longer first: that of UTF-32 begins as that of UTF-16. These codecs read the mark and leave it out.
_MARKS = (
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: How much is looked at for NUL bytes, and for the code page.
_HEAD, _MOST_LINES_BYTES = 4096, 1 << 16
#: Code pages of Windows and of East Asia, the commonest first: what Excel's "CSV" and Notepad's "ANSI" mean, by country.
_CODE_PAGES = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949", "koi8_r", "mac_roman", "cp850", "cp874"),
)
#: Characters that only texts in some encoding have whole, and those that only Japanese has.
_BEYOND_ASCII, _KANA, _KANA_SHARE = re.compile(r"[^\x00-\x7f\ufffd]+"), re.compile("[\u3041-\u30fe]"), 0.2
#: Shares of mess and of a language's letters that do not tell one code page from another.
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

    Of those that make about as much sense as the best one, in characters and in letters of a language, the commonest: Western
    European and Central European texts of a few words are often text in both.
    """
    from charset_normalizer import from_bytes

    lines = b"".join(_lines_beyond_ascii(data))
    for name in ("cp932", "euc_jp"):
        # of a few words the library takes them for Korean or Chinese
        found = "".join(_BEYOND_ASCII.findall(lines.decode(name, "replace")))
        if len(_KANA.findall(found)) > _KANA_SHARE * len(found):
            return name
    matches = list(from_bytes(lines, cp_isolation=list(_CODE_PAGES), enable_fallback=False))
    if not matches:
        return _CODE_PAGES[0]
    best = min(matches, key=lambda match: (round(match.chaos, 2), -match.coherence))
    likely = {
        name
        for match in matches
        if match.chaos <= best.chaos + _ALIKE and match.coherence >= best.coherence - _ALIKE
        # pages by which the text is the same are one match
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
