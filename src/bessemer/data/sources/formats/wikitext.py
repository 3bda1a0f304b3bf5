"""Wikitext to plain text: headings, paragraphs, lists, mathematics and code stay; templates, tables, notes and images go."""

from __future__ import annotations

import re
from typing import Any

import mwparserfromhell
from mwparserfromhell import nodes

#: Elements of which nothing is running text.
_DROPPED = frozenset(
    {
        "ref",
        "references",
        "gallery",
        "table",
        "timeline",
        "imagemap",
        "graph",
        "score",
        "hiero",
        "templatedata",
        "section",
        "style",
    }
)
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
    text = _MAGIC_WORDS.sub("", _text(code, left_out))
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


def _text(code: Any, left_out: tuple[str, ...]) -> str:
    return "".join(_node_text(node, left_out) for node in code.nodes)


def _node_text(node: Any, left_out: tuple[str, ...]) -> str:
    if isinstance(node, nodes.Text):
        return str(node.value)
    if isinstance(node, nodes.Wikilink):
        target = str(node.title).strip()
        if target.split(":")[0].strip().lower() in left_out and ":" in target:
            return ""
        return _text(node.text, left_out) if node.text is not None else target.lstrip(":").replace("_", " ")
    if isinstance(node, nodes.ExternalLink):
        return _text(node.title, left_out) if node.title is not None else "" if node.brackets else str(node.url)
    if isinstance(node, nodes.Heading):
        title = _text(node.title, left_out).strip()
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
    return _text(node.contents, left_out)
