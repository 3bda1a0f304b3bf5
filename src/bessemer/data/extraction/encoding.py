"""Decoding of pages: bytes in any encoding to UTF-8."""

from __future__ import annotations

import codecs
import re

#: How far into a page its own word on its encoding is looked for.
_HEAD = 4096
_META = re.compile(rb"<meta[^>]{0,400}?charset\s*=\s*[\"']?\s*([a-zA-Z0-9_:.-]{2,40})", re.IGNORECASE)
_XML = re.compile(rb"^\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([a-zA-Z0-9_:.-]{2,40})[\"']")
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
#: Labels of the WHATWG Encoding Standard (section 4.2) that resiliparse's table lacks.
_OTHER_LABELS = {"x-mac-cyrillic": "mac-cyrillic", "x-mac-ukrainian": "mac-cyrillic"}
#: Where Python's codec of the name decodes less than the standard's encoding does.
_LARGER = {
    "iso8859-11": "cp874",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
}
#: A page counts as UTF-8 with this share of undecodable bytes: cut off, or with one foreign snippet.
_FOREIGN_SHARE = 0.002


def to_utf8(html: str | bytes, *, encoding: str | None = None) -> bytes:
    """The page as valid UTF-8; what cannot be decoded becomes U+FFFD.

    A byte order mark decides; then whether the bytes are UTF-8, which other encodings hardly ever are by chance; then
    `encoding` (as a server names it), then the page's own word, then a guess from its bytes.
    """
    if isinstance(html, str):
        return html.encode("utf-8", "replace")
    for mark, name in _MARKS:
        if html.startswith(mark):
            return html[len(mark) :].decode(name, "replace").encode("utf-8", "replace")
    names = [*filter(None, (codec_of(encoding or ""), *map(codec_of_page, declared(html))))]
    if not any(name.startswith(("utf-16", "iso2022")) for name in names):
        try:
            html.decode("utf-8")
        except UnicodeDecodeError:
            pass
        else:
            return html
        decoded = html.decode("utf-8", "replace")
        if decoded.count("\ufffd") <= _FOREIGN_SHARE * len(html) and not html.isascii() and _has_sequence(html):
            return decoded.encode()
    for candidate in [*names, guessed(html), "cp1252"]:
        if candidate and candidate != "utf-8":
            decoded = html.decode(candidate, "replace")
            if decoded.count("\ufffd") <= 0.05 * len(decoded):
                return decoded.encode("utf-8", "replace")
    return html.decode("cp1252", "replace").encode("utf-8", "replace")


def declared(html: bytes) -> list[str]:
    """What the page says of its encoding, in a meta element or an XML declaration."""
    head = html[:_HEAD]
    return [found[1].decode("ascii") for pattern in (_XML, _META) if (found := pattern.search(head))]


def codec_of(label: str) -> str | None:
    """The codec for a label of the WHATWG Encoding Standard, None for any other label.

    Python has codecs that are no encodings of pages, and `punycode` takes time quadratic in a page's length. What the standard
    does not decode itself (`replacement`, `x-user-defined`) has no codec here either.
    """
    from resiliparse.parse.encoding import map_encoding_to_html5

    label = label.strip().strip("\"'").lower()
    name = _OTHER_LABELS.get(label) or map_encoding_to_html5(label, fallback_utf8=False)
    return None if name is None else _LARGER.get(name, name)


def codec_of_page(label: str) -> str | None:
    """The codec for a label that a page itself states (HTML Standard, section 13.2.3.2): a page whose label could be read as
    ASCII is not in UTF-16."""
    if label.lower() == "x-user-defined":
        return "cp1252"
    name = codec_of(label)
    return "utf-8" if name is not None and name.startswith("utf-16") else name


def guessed(html: bytes) -> str | None:
    """What resiliparse's detector makes of the bytes."""
    from resiliparse.parse.encoding import detect_encoding

    return codec_of(detect_encoding(html) or "")


def _has_sequence(html: bytes) -> bool:
    """Whether a multi-byte sequence of UTF-8 occurs at all."""
    return re.search(rb"[\xc3-\xf4][\x80-\xbf]", html) is not None
