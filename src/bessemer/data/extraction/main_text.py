"""Main text of a page by the model of its blocks: parsed, measured, judged, decided, rendered; the page's title above it."""

from __future__ import annotations

import json
import re

import numpy as np

from bessemer.data.extraction.block_counts import CHARACTERS
from bessemer.data.extraction.block_text import block_text
from bessemer.data.extraction.decide import decide
from bessemer.data.extraction.feature_columns import FEATURES
from bessemer.data.extraction.features import features
from bessemer.data.extraction.model import Model, judge, trained
from bessemer.data.extraction.parsing import Page, parse
from bessemer.data.extraction.render import render
from bessemer.data.extraction.tags import HEADING, NUMBER, TRAITS

#: With less text than this the page's other hiding places are looked into: what CSS hides, and data for search engines.
_HARDLY_ANY = 200
_ARTICLE_BODY = re.compile(rb'"articleBody"\s*:\s*("(?:[^"\\]|\\.)*")')
_TITLE_SHARE = FEATURES.index("title_share")
_H1 = NUMBER["h1"]


def main_text(html: bytes, model: Model | None = None) -> str:
    """The main text of a page in valid UTF-8, by `model` or the one that comes with the package."""
    data = np.frombuffer(html, np.uint8)
    text = _text_of(data, parse(data), model or trained())
    if len(text) < _HARDLY_ANY:
        stated = _article_body(html)
        hidden = _text_of(data, parse(data, keep_hidden=True), model or trained()) if len(html) > 20 * len(text) else ""
        text = max(text, stated, hidden if len(hidden) > 2 * len(text) and len(hidden) > _HARDLY_ANY else "", key=len)
    return text


def _text_of(data: np.ndarray, page: Page, model: Model) -> str:
    if not len(page.block_elements):
        return ""
    rows, counts = features(data, page, model.words)
    sizes = counts[:, CHARACTERS]
    keep = decide(judge(rows, counts, page, model), rows, counts, page, model.threshold)
    return _with_title(render(data, page, keep, sizes), data, page, keep, rows)


def _with_title(text: str, data: np.ndarray, page: Page, keep: np.ndarray, rows: np.ndarray) -> str:
    """The text below the page's title, unless a heading in it says the title already."""
    tags = page.tags[page.block_elements]
    headings = (TRAITS[tags] & HEADING) != 0
    if not text or (keep & headings & ((tags == _H1) | (rows[:, _TITLE_SHARE] > 0.5))).any():
        return text
    others = np.flatnonzero(~keep & (tags == _H1) & (rows[:, _TITLE_SHARE] > 0.5))
    title = block_text(data, page, int(others[0])) if len(others) else _named_title(data, page)
    title = " ".join(title.split())
    return f"# {title}\n\n{text}" if title and title not in text[: 2 * len(title) + 200] else text


def _named_title(data: np.ndarray, page: Page) -> str:
    """What the page's head calls it, without the name of the site behind a dash or bar."""
    from html import unescape

    start, end, og_start, og_end = page.title
    if og_end > og_start:
        return unescape(data[og_start:og_end].tobytes().decode("utf-8", "replace"))
    title = unescape(data[start:end].tobytes().decode("utf-8", "replace")).strip()
    parts = re.split(r"\s+[|–—·»«:-]+\s+", title[:500])
    return parts[0] if len(parts[0]) * 2 >= len(max(parts, key=len)) else max(parts, key=len)


def _article_body(html: bytes) -> str:
    """The text that a page of scripts gives to search engines (schema.org's articleBody)."""
    found = _ARTICLE_BODY.search(html)
    if not found:
        return ""
    try:
        text = json.loads(found[1], strict=False)
    except ValueError:
        return ""
    lines = [" ".join(re.sub(r"<[^<>]{1,200}>", " ", line).split()) for line in str(text).splitlines()]
    return "\n\n".join(line for line in lines if line)
