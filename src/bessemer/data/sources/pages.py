"""Web pages to documents: encoding, what the page says about its licence and its use, and its main text."""

from __future__ import annotations

import codecs
import html
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from bessemer.data.sources.document import Document, Tally
from bessemer.data.sources.licences import license_of_address

#: From a page and its address to its main text.
Extract = Callable[[str, str | None], str]

_HEAD = 1 << 16
_META = re.compile(r"<meta\b[^>]{0,4000}>", re.I)
_ATTRIBUTE = re.compile(r"""([a-z:-]+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""", re.I)
_CHARSET = re.compile(rb"""<meta\b[^>]{0,400}?charset\s*=\s*["']?\s*([a-z0-9_:.-]+)""", re.I)
_LICENSE_LINK = re.compile(r"""\brel\s*=\s*["']?[^"'>]{0,80}\blicen[cs]e\b""", re.I)
_LANGUAGE = re.compile(r"""<html\b[^>]{0,2000}?\blang\s*=\s*["']?([a-z]{2,3})\b""", re.I)
_TITLE = re.compile(r"<title[^>]{0,200}>([^<]{1,2000})</title", re.I)
_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
#: Words in `robots` rules that speak against use of a page; https://www.rfc-editor.org/rfc/rfc9309 and the sites' own.
_OPT_OUT_RULES = frozenset({"noai", "noimageai", "noindex", "none", "noarchive", "noml", "notrain"})
_ROBOT_NAMES = ("robots", "googlebot", "googlebot-news", "bingbot", "ccbot", "gptbot", "google-extended", "bessemer")


@dataclass(frozen=True)
class Extraction:
    """How main text is found: one of Bessemer's extractors by name, or a function."""

    extractor: str = "bessemer"
    function: Extract | None = None

    def __call__(self, page: str, url: str | None, place: str, tally: Tally) -> str:
        """A page's main text; empty, and set aside, where the extractor fails on it."""
        try:
            return (self.function or self._built_in())(page, url)
        except Exception as error:  # whatever a hostile page makes an extractor raise
            tally.set_aside("extraction_failures", place, f"{type(error).__name__}: {error}")
            return ""

    def _built_in(self) -> Extract:
        from bessemer.data.extraction.extract import extract

        return lambda page, url: extract(page, url=url, extractor=self.extractor)


def page_document(
    page: bytes,
    locator: str,
    place: str,
    extraction: Extraction,
    tally: Tally,
    *,
    url: str | None = None,
    charset: str | None = None,
    headers: Iterable[tuple[str, str]] = (),
    license: str | None = None,
    group: str | None = None,
    metadata: dict[str, str] | None = None,
) -> Document | None:
    """The document of a page; None, and counted, where it has no main text.

    `charset` and `headers` are what its server said, `license` what holds unless the page names another, `group`
    what it shares its split with (its host where None is given).
    """
    markup = decode_page(page, charset, tally)
    text = extraction(markup, url, place, tally)
    if not text.strip():
        tally.counts["pages_without_text"] += 1
        return None
    head = markup[:_HEAD]
    said = dict(metadata or {})
    if title := _TITLE.search(head):
        said["title"] = " ".join(html.unescape(title[1]).split())
    if language := _LANGUAGE.search(head):
        said["html_language"] = language[1].lower()
    if opted_out := opt_out(head, headers):
        said["opt_out"] = opted_out
        tally.counts["opted_out"] += 1
    stated = _license_link(markup)
    host = urlsplit_host(url) if url else None
    return Document(locator, text, url=url, license=stated or license, group=group or host, metadata=said)


def decode_page(page: bytes, charset: str | None, tally: Tally) -> str:
    """A page as text: by its byte order mark, its server's word, its own, or as what its bytes look like."""
    for mark, encoding in _BYTE_ORDER_MARKS:
        if page.startswith(mark):
            return page[len(mark) :].decode(encoding, errors="replace")
    declared = _CHARSET.search(page[:4096])
    for name in (charset, declared[1].decode("ascii") if declared else None, "utf-8"):
        if (declared_encoding := _known_encoding(name)) and not _is_wide(declared_encoding):
            try:
                return page.decode(declared_encoding)
            except UnicodeDecodeError:
                continue
    from resiliparse.parse.encoding import detect_encoding

    text = page.decode(_known_encoding(detect_encoding(page, html5_compatible=True)) or "cp1252", errors="replace")
    if "\ufffd" in text:
        tally.counts["undecodable_pages"] += 1
    return text


def _known_encoding(name: str | None) -> str | None:
    if not name:
        return None
    try:
        known = codecs.lookup(name.strip().strip("\"'"))
    except (LookupError, ValueError):
        return None
    if not getattr(known, "_is_text_encoding", True):
        return None
    return "cp1252" if known.name in ("iso8859-1", "ascii") else known.name  # as browsers read them


def _is_wide(encoding: str) -> bool:
    """An encoding that a page cannot truthfully declare in a `meta` that was read as bytes."""
    return encoding.startswith(("utf-16", "utf-32", "utf-7", "punycode", "idna", "unicode_escape", "raw_unicode"))


def opt_out(head: str, headers: Iterable[tuple[str, str]] = ()) -> str | None:
    """What a page or its server said against indexing, training on, or mining it: the signs, sorted, in one string.

    Looked at are `robots` metas and `X-Robots-Tag` headers, and the TDM reservation (W3C TDM Reservation Protocol).
    """
    signs = set()
    for tag in _META.finditer(head):
        said = {name.lower(): html.unescape(a or b or c) for name, a, b, c in _ATTRIBUTE.findall(tag[0])}
        name, content = said.get("name", "").strip().lower(), said.get("content", "")
        if name in _ROBOT_NAMES:
            signs |= _rules(content)
        elif name == "tdm-reservation" and content.strip() == "1":
            signs.add("tdm-reservation")
    for header, value in headers:
        if header.lower() == "x-robots-tag":
            signs |= _rules(value)
        elif header.lower() == "tdm-reservation" and value.strip() == "1":
            signs.add("tdm-reservation")
    return ", ".join(sorted(signs)) or None


def _rules(value: str) -> set[str]:
    return {rule for rule in re.split(r"[\s,;:]+", value.lower()) if rule in _OPT_OUT_RULES}


def _license_link(markup: str) -> str | None:
    for found in _LICENSE_LINK.finditer(markup):
        begin, end = markup.rfind("<", max(found.start() - 2000, 0), found.start()), markup.find(">", found.end())
        if begin >= 0 and 0 < end - begin < 4000:
            said = {name.lower(): html.unescape(a or b or c) for name, a, b, c in _ATTRIBUTE.findall(markup[begin:end])}
            if known := license_of_address(said.get("href", "")):
                return known
    return None


def urlsplit_host(url: str) -> str | None:
    """The host of an address, in lower case; None where it has none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
