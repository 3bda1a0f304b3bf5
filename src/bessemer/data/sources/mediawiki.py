"""Source `mediawiki`: XML dumps of Wikipedia and other wikis, page by page, and wikitext to plain text.

The dump is cut at `<page>` and `</page>`, and each page parsed on its own: damage stays in its page, memory is bounded by one.
Headings, paragraphs, lists, mathematics and code stay; templates, tables, notes and images go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import quote

import mwparserfromhell
from mwparserfromhell import nodes

from bessemer.data.limited import RefusedError
from bessemer.data.sources.html import urlsplit_host
from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.file_source import Marks, SettingsFormat, fragments, note_end
from bessemer.data.sources.markup import children, parse_xml
from bessemer.data.sources.registry import MediaWikiSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, encodable

#: Elements of which nothing is running text.
_WITHOUT_TEXT = "ref references gallery table timeline imagemap graph score hiero templatedata section style"
_DROPPED = frozenset(_WITHOUT_TEXT.split())
_CODE = frozenset({"syntaxhighlight", "source", "pre"})
_MATHEMATICS = frozenset({"math", "chem", "ce"})
_LISTS = {"*": "- ", "#": "1. ", ";": "", ":": "", "----": ""}
_EMPTY_BRACKETS = re.compile(r"\s*\((?:[\s,;:/·–-]|&nbsp;)*\)")
_MAGIC_WORDS = re.compile(r"__[A-Z]+__")
_LIST_ITEM = re.compile(r"^(-|1\.) +")
_HEADING = re.compile(r"(#{1,6}) .+")


def wikitext_to_text(wikitext: str, left_out: tuple[str, ...]) -> str:
    """The text of a page. `left_out`: prefixes, in lower case, of links that show no text (files, categories)."""
    code = mwparserfromhell.parse(wikitext, skip_style_tags=True)
    text = _MAGIC_WORDS.sub("", _plain_text(code, left_out))
    text = _EMPTY_BRACKETS.sub("", text.replace("'''", "").replace("''", ""))
    lines = [_LIST_ITEM.sub(r"\1 ", line.rstrip()) for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(_with_content(lines))).strip()


def _with_content(lines: list[str]) -> list[str]:
    """The lines without headings under which nothing stands (references, external links)."""
    kept: list[str] = []
    # reading from the end: the level of the heading kept last, 0 for text, None at the end
    follows: int | None = None
    for line in reversed(lines):
        heading = _HEADING.fullmatch(line)
        if heading is None:
            kept.append(line)
            follows = 0 if line.strip() else follows
        elif follows is not None and (follows == 0 or follows > len(heading[1])):
            kept.append(line)
            follows = len(heading[1])
    kept.reverse()
    return kept


def _plain_text(code: Any, left_out: tuple[str, ...]) -> str:
    return "".join(_node_text(node, left_out) for node in code.nodes)


def _node_text(node: Any, left_out: tuple[str, ...]) -> str:
    if isinstance(node, nodes.Text):
        return str(node.value)
    if isinstance(node, nodes.Wikilink):
        target = str(node.title).strip()
        if target.split(":")[0].strip().lower() in left_out and ":" in target:
            return ""
        return _plain_text(node.text, left_out) if node.text is not None else target.lstrip(":").replace("_", " ")
    if isinstance(node, nodes.ExternalLink):
        return _plain_text(node.title, left_out) if node.title is not None else "" if node.brackets else str(node.url)
    if isinstance(node, nodes.Heading):
        title = _plain_text(node.title, left_out).strip()
        return f"\n{'#' * node.level} {title}\n" if title else ""
    if isinstance(node, nodes.HTMLEntity):
        return str(node.normalize())
    if isinstance(node, nodes.Tag):
        return _tag_text(node, left_out)
    # templates, arguments, comments
    return ""


def _tag_text(node: Any, left_out: tuple[str, ...]) -> str:
    name = str(node.tag).strip().lower()
    if node.wiki_markup and node.self_closing:
        return _LISTS.get(str(node.wiki_markup), "")
    if name == "br":
        return "\n"
    if name in _DROPPED or node.contents is None:
        return ""
    if name in _MATHEMATICS:
        return f"${str(node.contents).strip()}$"
    if name in _CODE:
        return f"\n```\n{str(node.contents).strip(chr(10))}\n```\n"
    return _plain_text(node.contents, left_out)


_HEAD_BYTES = 1 << 20
_WIKIMEDIA = re.compile(
    r"(^|\.)(wikipedia|wiktionary|wikibooks|wikiquote|wikisource|wikiversity|wikivoyage|wikinews|wikimedia)\.org$"
)
#: https://foundation.wikimedia.org/wiki/Policy:Terms_of_Use, section 7; Wikinews alone differs.
_WIKIMEDIA_LICENSE = "CC-BY-SA-4.0"
_FILE_NAMESPACES, _MEDIA, _CATEGORY = (6, -2), "Media", 14


@dataclass(frozen=True)
class MediaWiki(SettingsFormat):
    """One document a page, redirects left out."""

    settings: MediaWikiSource
    known: ClassVar[str] = ".xml, plain or compressed"
    archives: ClassVar[tuple[str, ...]] = ()

    def reads(self, name: str) -> bool:
        return name.lower().endswith(".xml") or "-pages-articles" in name

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        site = _site(entry)
        marks = Marks(entry, start)
        with marks.stream as stream:
            for begin, end, fragment in fragments(stream, b"<page>", b"</page>", self.settings.max_document_bytes):
                if not marks.begins(begin):
                    continue
                place = f"{entry.place}: {marks.where(begin)}"
                if fragment is None:
                    tally.set_aside("too_large", place, f"a page of {end - begin:,} bytes")
                    continue
                try:
                    document = self._document(fragment, site, entry, tally)
                except ValueError as error:
                    tally.set_aside("damaged_records", place, str(error))
                except RefusedError as refused:
                    tally.set_aside(refused.kind, place, str(refused))
                else:
                    if document is not None:
                        yield marks.behind(end), document
            note_end(entry, stream.damage, stream.tell(), tally)

    def _document(self, fragment: bytes, site: _Site, entry: Entry, tally: Tally) -> Document | None:
        page = parse_xml(fragment, forgiving=False)
        said = {name: _element_text(page, name) for name in ("title", "ns", "id")}
        if not said["id"]:
            raise ValueError("a page without an id")
        if int(said["ns"] or 0) not in self.settings.namespaces:
            tally.counts["pages_of_other_namespaces"] += 1
            return None
        revisions = children(page, "revision")
        wikitext = _element_text(revisions[-1], "text") if revisions else ""
        if children(page, "redirect") or re.match(r"\s*#redirect\b", wikitext, re.I):
            tally.counts["redirects"] += 1
            return None
        text = entry.around.helpers.call(wikitext_to_text, self.settings.seconds, wikitext, site.left_out)
        if not text:
            tally.counts["pages_without_text"] += 1
            return None
        title = encodable(said["title"])
        metadata = {"page": said["id"], "title": title, "wiki": site.name}
        if revision := _element_text(revisions[-1], "id"):
            metadata["revision"] = revision
        if stamp := _element_text(revisions[-1], "timestamp"):
            metadata["date"] = stamp
        return Document(
            f"{site.name}/{said['id']}",
            text,
            heading=title,
            url=site.address(title),
            license=entry.license or site.license,
            metadata=metadata,
        )


open_mediawiki = MediaWiki.open


@dataclass(frozen=True)
class _Site:
    """The wiki, by the head of its dump."""

    name: str
    base: str | None
    #: Prefixes of links that show nothing or an image: the wiki's own names of its files and categories.
    left_out: tuple[str, ...]

    @property
    def license(self) -> str | None:
        host = urlsplit_host(self.base) if self.base else None
        return _WIKIMEDIA_LICENSE if host and _WIKIMEDIA.search(host) else None

    def address(self, title: str) -> str | None:
        """The page's address, formed like the main page's."""
        return self.base.rpartition("/")[0] + "/" + quote(title.replace(" ", "_"), safe="/:(),'!*@") if self.base else None


def _site(entry: Entry) -> _Site:
    with entry.open() as stream:
        head = stream.read(_HEAD_BYTES)
    match = re.search(rb"<siteinfo>.*?</siteinfo>", head, re.S)
    left_out = ["File", "Image", _MEDIA, "Category"]
    name, base = entry.name.rpartition("/")[2].removesuffix(".xml"), None
    if match:
        try:
            info = parse_xml(match[0])
        except ValueError:
            return _Site(name, base, tuple(left_out))
        name, base = _element_text(info, "dbname") or name, _element_text(info, "base") or None
        for group in children(info, "namespaces"):
            for namespace in children(group, "namespace"):
                if namespace.get("key") in {str(key) for key in (*_FILE_NAMESPACES, _CATEGORY)} and namespace.text:
                    left_out.append(namespace.text)
    return _Site(encodable(name), base, tuple(dict.fromkeys(prefix.lower() for prefix in left_out)))


def _element_text(element: Any, name: str) -> str:
    elements = children(element, name)
    return (elements[0].text or "").strip() if elements else ""
