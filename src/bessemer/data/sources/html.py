"""Web pages: a page's bytes to a document of its main text, and the source `html`, trees and archives of saved pages."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from bessemer.core.errors import BessemerError, SourceError
from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.file_source import SettingsFormat
from bessemer.data.sources.registry import HtmlSource
from bessemer.data.sources.source import LICENSE_HOSTS, TRAINING_ROBOTS, Document, PositionedDocument, Tally, license_of_address

if TYPE_CHECKING:
    from bessemer.data.extraction.extract import NoAnswerError


#: From a page as UTF-8 and its address to its main text.
Extract = Callable[[bytes, str | None], str]
OnFailure = Callable[["NoAnswerError"], None]

_FAULTLESS = b"<html><body><article><h1>Steel</h1><p>Steel is an alloy of iron and carbon.</p></article></body></html>"
_HEAD = 1 << 16
_REPLACEMENT = "\ufffd".encode()
_LICENSE_WORDS = frozenset({"license", "licence"})
#: Possessive quantifiers and a fixed start of names: linear time on hostile pages.
_META = re.compile(r"<meta\b[^>]{0,4000}+>", re.I)
_ATTRIBUTE = re.compile(r"""(?<![a-z:-])([a-z:-]++)\s*+=\s*+(?:"([^"]*+)"|'([^']*+)'|([^\s"'>]++))""", re.I)
_LANGUAGE = re.compile(r"""<html\b[^>]{0,2000}?\blang\s*=\s*["']?([a-z]{2,3})\b""", re.I)
_TITLE = re.compile(r"<title[^>]{0,200}>([^<]{1,2000})</title", re.I)
#: Words in `robots` rules that speak against training. `noindex` and `noarchive` do not: they are about results and copies in
#: search engines.
_OPT_OUT_RULES = frozenset({"noai", "noimageai", "noml", "nomlt", "notrain"})
#: Rules that speak against training where they address a robot that gathers for training.
_CLOSED_RULES = frozenset({"noindex", "none"})
_TRAINING_ROBOTS = frozenset(name.lower() for name in TRAINING_ROBOTS)
_SIGN = re.compile("bot|tdm-|google-|anthropic-|bessemer", re.I)
_ADDRESSED = re.compile(r"\s*([\w-]+)\s*:")
_ROBOT_NAMES = frozenset({"robots", "googlebot", "googlebot-news", "bingbot", "bessemer"}) | _TRAINING_ROBOTS


@dataclass(frozen=True)
class Extraction:
    """The extractor of main text: one of Bessemer's by name, or a function."""

    extractor: str = "bessemer"
    function: Extract | None = None

    def __call__(self, page: bytes, url: str | None, place: str, tally: Tally) -> str:
        """A page's main text; empty, and set aside, where the extractor fails on it or runs out of time."""
        try:
            if self.function is not None:
                return self.function(page, url)
            extract = _working_extractor(self.extractor)
            return extract(page, url, lambda error: tally.set_aside(error.kind, place, str(error)))
        except BessemerError:  # an extractor that is not installed: no fault of the page
            raise
        except Exception as error:  # whatever a hostile page makes an extractor raise
            tally.set_aside("extraction_failures", place, f"{type(error).__name__}: {error}")
            return ""


@functools.cache
def _working_extractor(name: str) -> Callable[[bytes, str | None, OnFailure | None], str]:
    """The extractor of this name, tried on a page without a fault: one that fails there would quietly empty a whole crawl.
    Raises ConfigError when it is not installed, SourceError when it does not work."""
    from bessemer.data.extraction.extract import extract

    try:
        extract(_FAULTLESS, extractor=name, on_failure=_raise)
    except BessemerError:
        raise
    except Exception as error:
        raise SourceError(f"extractor {name!r} does not work here: {type(error).__name__}: {error}") from error
    return lambda page, url, on_failure: extract(page, url=url, extractor=name, on_failure=on_failure)


def _raise(error: NoAnswerError) -> None:
    raise error


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
    """The document of a page; None, and counted, where it has no main text. `charset` and `headers` are what its server said,
    `license` what holds unless the page names another, `group` what it shares its split with (its host where None is given)."""
    from bessemer.data.extraction.extract import to_utf8

    decoded = to_utf8(page, encoding=charset)
    if decoded is not page and _REPLACEMENT in decoded and _REPLACEMENT not in page:
        tally.set_aside("undecodable_pages", place, "bytes that its encoding does not know were replaced")
    text = extraction(decoded, url, place, tally)
    if not text.strip():
        tally.counts["pages_without_text"] += 1
        return None
    head = decoded[:_HEAD].decode("utf-8", errors="ignore")
    said = dict(metadata or {})
    if title := _TITLE.search(head):
        said["title"] = " ".join(html.unescape(title[1]).split())
    if language := _LANGUAGE.search(head):
        said["html_language"] = language[1].lower()
    if opted_out := opt_out(head, headers):
        said["opt_out"] = opted_out
        tally.counts["opted_out"] += 1
    stated = license_link(decoded)
    host = urlsplit_host(url) if url else None
    return Document(locator, text, url=url, license=stated or license, group=group or host, metadata=said)


def opt_out(head: str, headers: Iterable[tuple[str, str]] = ()) -> str | None:
    """Objections of a page or its server to training or mining: the signs, sorted, in one string. Looked at are
    `robots` metas and `X-Robots-Tag` headers, and the TDM reservation (W3C TDM Reservation Protocol)."""
    signs = set()
    for tag in _META.finditer(head):
        if not _SIGN.search(tag[0]):
            continue
        said = {name.lower(): html.unescape(a or b or c) for name, a, b, c in _ATTRIBUTE.findall(tag[0])}
        name, content = said.get("name", "").strip().lower(), said.get("content", "")
        if name in _ROBOT_NAMES:
            signs |= _rules(content, name)
        elif name == "tdm-reservation" and content.strip() == "1":
            signs.add("tdm-reservation")
    for header, value in headers:
        if header.lower() == "x-robots-tag":
            addressed = _ADDRESSED.match(value)
            signs |= _rules(value, addressed[1].lower() if addressed else "robots")
        elif header.lower() == "tdm-reservation" and value.strip() == "1":
            signs.add("tdm-reservation")
    return ", ".join(sorted(signs)) or None


def _rules(value: str, robot: str) -> set[str]:
    """The signs in the rules that are given to a robot, or to all `robots`."""
    rules = set(re.split(r"[\s,;:]+", value.lower()))
    closed = rules & _CLOSED_RULES if robot in _TRAINING_ROBOTS else ()
    return rules & _OPT_OUT_RULES | {f"{robot}: {rule}" for rule in closed}


def license_link(page: bytes) -> str | None:
    """The licence that a page links as its own, with `rel="license"`. Known licences' hosts are looked for, which is
    many times faster than to look at every link."""
    for host in LICENSE_HOSTS:
        at = page.find(host)
        while at >= 0:
            begin, end = page.rfind(b"<", max(at - 2000, 0), at), page.find(b">", at, at + 2000)
            behind = at
            if begin >= 0 and at < end:
                # a tag is read once, however often it names the host
                behind = end
                tag = page[begin:end].decode("utf-8", errors="replace")
                said = {name.lower(): html.unescape(a or b or c) for name, a, b, c in _ATTRIBUTE.findall(tag)}
                is_its_own = _LICENSE_WORDS.intersection(said.get("rel", "").lower().split())
                if is_its_own and (known := license_of_address(said.get("href", ""))):
                    return known
            at = page.find(host, behind + 1)
    return None


def urlsplit_host(url: str) -> str | None:
    """The host of an address, in lower case; None where it has none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


HTML_SUFFIXES = (".html", ".htm", ".xhtml")


@dataclass(frozen=True)
class PageFormat(SettingsFormat):
    """A format whose files hold web pages. extraction: how main text is found, where not by the settings' `extractor`."""

    extraction: Extraction | None = None

    def page_document(self, page: bytes, locator: str, place: str, tally: Tally, **known: Any) -> Document | None:
        """The document of a page; see the function `page_document`."""
        extraction = self.extraction or Extraction(self.settings.extractor)
        return page_document(page, locator, place, extraction, tally, **known)


@dataclass(frozen=True)
class Html(PageFormat):
    """One page a file. `base_url`, where it is given, and the file's path below the root make its address."""

    settings: HtmlSource
    known: ClassVar[str] = "/".join(HTML_SUFFIXES)
    small: ClassVar[bool] = True

    def reads(self, name: str) -> bool:
        return PurePosixPath(name).suffix.lower() in HTML_SUFFIXES

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        page = None if start else entry.content(self.settings.max_document_bytes, tally)
        if page is not None:
            url = f"{self.settings.base_url.rstrip('/')}/{entry.name}" if self.settings.base_url else None
            described = {"file": entry.name}
            document = self.page_document(
                page, entry.name, entry.place, tally, url=url, license=entry.license, metadata=described
            )
            if document is not None:
                yield 1, document


open_html = Html.open
