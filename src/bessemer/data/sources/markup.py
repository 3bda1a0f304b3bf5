"""HTML and XML that is all text to plain text with its structure: books' chapters, forums' posts, pages of documentation.

Headings, lists, quotations, code and tables as Markdown writes them, without looking for boilerplate. XML parsing is bounded:
no entities are expanded, no DTD and no network is read, and trees stay within libxml's limits.
"""

from __future__ import annotations

import re
from typing import Any

from lxml import etree


def parse_xml(data: bytes, *, forgiving: bool = True) -> Any:
    """The root element of a document or fragment. Raises ValueError when there is none, or it is nested too deeply.

    `forgiving` reads on over mistakes as browsers do. An entity that a document defines for itself stays what it is, so
    that a few bytes cannot expand to gigabytes.
    """
    parser = etree.XMLParser(
        resolve_entities=False,
        load_dtd=False,
        no_network=True,
        huge_tree=False,
        recover=forgiving,
        remove_comments=True,
        remove_pis=True,
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        raise ValueError(f"not XML ({error})") from None
    if root is None:
        raise ValueError("not XML (no element found)")
    return root


def local_name(element: Any) -> str:
    """An element's name without its namespace; `` for comments, entities and the like."""
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def children(element: Any, name: str) -> list[Any]:
    """The direct children with this local name."""
    return [child for child in element if local_name(child) == name]


def descendant_text(element: Any, name: str) -> str | None:
    """The text of the first descendant with this local name, stripped; None where there is none with text."""
    for descendant in element.iter():
        if local_name(descendant) == name and (text := "".join(descendant.itertext()).strip()):
            return text
    return None


_SKIPPED = frozenset(
    {"script", "style", "head", "template", "noscript", "svg", "iframe", "object", "button", "select", "rt", "rp"}
)
_BLOCKS = frozenset(
    {"address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt", "fieldset"}
    | {"figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html", "legend", "li"}
    | {"main", "nav", "ol", "p", "pre", "section", "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul"}
)
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
#: Most elements of a page or fragment: more than any chapter or post has.
_MOST_ELEMENTS = 300_000
#: White space other than single spaces, which need no replacement.
_WHITE_SPACE = re.compile(r"[ \t\n\r\f]{2,}|[\t\n\r\f]")
_SPACES = re.compile(" {2,}")


def text_of_markup(data: bytes | str) -> str:
    """The text of a page or fragment. Raises ValueError where there is none to be parsed, or far too much. Walks without
    recursion, so that nesting cannot exhaust the stack; libxml2 itself stops at 255 levels."""
    if isinstance(data, str):
        data = data.encode("utf-8", errors="replace")
        parser = etree.HTMLParser(encoding="utf-8", no_network=True, remove_comments=True, remove_pis=True)
    else:
        parser = etree.HTMLParser(encoding=_declared(data), no_network=True, remove_comments=True, remove_pis=True)
    if not data.strip():
        return ""
    try:
        root = etree.fromstring(data, parser)
    except etree.ParserError as error:
        raise ValueError(f"not HTML ({error})") from None
    if root is None:
        return ""
    writer = _Writer()
    count = 0
    for event, element in etree.iterwalk(root, events=("start", "end")):
        if event == "start":
            count += 1
            if count > _MOST_ELEMENTS:
                raise ValueError(f"more than {_MOST_ELEMENTS:,} elements")
            writer.enter(element)
        else:
            writer.leave(element)
    return writer.finish()


def _declared(data: bytes) -> str | None:
    match = re.search(rb"""(?:encoding|charset)\s*=\s*["']?\s*([A-Za-z0-9_.:-]+)""", data[:1024])
    if match is None:
        return "utf-8"
    try:
        etree.HTMLParser(encoding=match[1].decode("ascii"))
    except LookupError:
        return "utf-8"
    return match[1].decode("ascii")


class _Writer:
    def __init__(self) -> None:
        self._lines: list[str] = []
        self._line: list[str] = []
        self._skipping = self._preformatted = self._quotes = self._cells = 0
        # the next number of each open ordered list, None for the others
        self._lists: list[int | None] = []
        self._marker = ""

    def enter(self, element: Any) -> None:
        tag = element.tag if isinstance(element.tag, str) else ""
        if self._skipping or tag in _SKIPPED:
            self._skipping += 1
            return
        if tag in _BLOCKS and not (self._cells and tag in ("p", "div", "td", "th")):
            self._end_line()
        if tag in _HEADINGS:
            self._blank()
            self._marker = _HEADINGS[tag]
        elif tag == "pre":
            self._blank()
            self._line.append("```\n")
            self._preformatted += 1
        elif tag == "blockquote":
            self._blank()
            self._quotes += 1
        elif tag in ("ul", "ol"):
            self._lists.append(1 if tag == "ol" else None)
        elif tag == "li":
            self._marker = self._list_marker()
        elif tag in ("td", "th"):
            if self._cells:
                self._line.append(" | ")
            self._cells += 1
        elif tag == "tr":
            self._cells = 0
        elif tag == "br":
            self._line.append("\n")
        elif tag == "code" and not self._preformatted:
            self._line.append("`")
        elif tag in ("p", "table", "dl"):
            self._blank()
        self._add(element.text)

    def leave(self, element: Any) -> None:
        tag = element.tag if isinstance(element.tag, str) else ""
        if self._skipping:
            self._skipping -= 1
            if not self._skipping:
                self._add(element.tail)
            return
        if tag == "pre":
            self._preformatted -= 1
            if self._line and not self._line[-1].endswith("\n"):
                self._line.append("\n")
            self._line.append("```")
            self._end_line()
            self._blank()
        elif tag == "code" and not self._preformatted:
            self._line.append("`")
        elif tag == "tr":
            self._cells = 0
            self._end_line()
        elif tag in _BLOCKS and not (self._cells and tag in ("p", "div", "td", "th")):
            self._end_line()
            if tag in ("p", "table", "blockquote", "dl") or tag in _HEADINGS:
                self._blank()
        if tag == "blockquote":
            self._quotes -= 1
        elif tag in ("ul", "ol") and self._lists:
            self._lists.pop()
            if not self._lists:
                self._blank()
        self._add(element.tail)

    def _list_marker(self) -> str:
        indent = "  " * (len(self._lists) - 1)
        if not self._lists or self._lists[-1] is None:
            return f"{indent}- "
        number = self._lists[-1]
        self._lists[-1] = number + 1
        return f"{indent}{number}. "

    def _add(self, text: str | None) -> None:
        if text:
            self._line.append(text if self._preformatted else _WHITE_SPACE.sub(" ", text))

    def _end_line(self) -> None:
        text = "".join(self._line)
        self._line = []
        if not self._preformatted and "```" not in text:
            text = "\n".join(part.strip() for part in _SPACES.sub(" ", text).split("\n")).strip()
        if text.strip():
            quote = "> " * min(self._quotes, 8)
            lines = (self._marker + text.strip("\n")).split("\n")
            self._lines += [quote + line if quote else line for line in lines]
            self._marker = ""

    def _blank(self) -> None:
        self._end_line()
        if self._lines and self._lines[-1]:
            self._lines.append("")

    def finish(self) -> str:
        self._end_line()
        return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in self._lines)).strip()
