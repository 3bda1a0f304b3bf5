"""Extraction of a web page's main text: by Bessemer's own model, by resiliparse or trafilatura, or by a union of both.

Ours: bytes in any encoding become UTF-8 and are parsed, blocks are measured and judged by the model, chosen by their
probabilities (with a fallback where next to nothing is left) and rendered, the page's title above them.

Different extractors keep different pages and paragraphs, and a corpus gains from having both (arXiv 2602.19548). trafilatura
can take minutes on a hostile page, so it runs in processes of its own that are ended when a page takes too long.
"""

from __future__ import annotations

import codecs
import json
import queue
import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import numpy as np

from bessemer.core.environment import install_extra, usable_cores
from bessemer.core.errors import ConfigError
from bessemer.data.extraction.block_text import block_text
from bessemer.data.extraction.blocks import CHARACTERS, CLOSED, HASH, LINK_CHARACTERS
from bessemer.data.extraction.features import features
from bessemer.data.extraction.model import FEATURES, Model, judge, trained
from bessemer.data.extraction.parsing import Page, parse
from bessemer.data.extraction.render import laid_out, render, table_of_blocks
from bessemer.data.extraction.vocabulary import HEADING, NUMBER, TRAITS
from bessemer.data.limited import Limited, RefusedError

#: Bytes of a page in which its declaration of an encoding is searched.
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
    """Encodings that the page declares, in a meta element or an XML declaration."""
    head = html[:_HEAD]
    return [match[1].decode("ascii") for pattern in (_XML, _META) if (match := pattern.search(head))]


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
    """The encoding that resiliparse detects from the bytes."""
    from resiliparse.parse.encoding import detect_encoding

    return codec_of(detect_encoding(html) or "")


def _has_sequence(html: bytes) -> bool:
    """Whether a multi-byte sequence of UTF-8 occurs at all."""
    return re.search(rb"[\xc3-\xf4][\x80-\xbf]", html) is not None


#: With fewer characters chosen, more blocks are taken if the page has more.
_TOO_SHORT = 100
_H1 = NUMBER["h1"]
_CANDIDATE = FEATURES.index("candidate_in")
_TITLE_SHARE = FEATURES.index("title_share")


def _without_lone_headings(keep: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Drops a kept heading whose own text was not kept: the next block is gone, and the next one kept is a heading of its
    rank or above, or there is none. `levels`, (B,): 1 to 7, and 9 for what is no heading.
    """
    kept = keep.copy()
    # the level of the next block that is kept
    following = 0
    for block in np.flatnonzero(keep)[::-1].tolist():
        alone = following <= levels[block] < 9 and not (block + 1 < len(keep) and keep[block + 1])
        if alone and (levels[block] > 1 or following == 0):
            kept[block] = False
        else:
            following = int(levels[block])
    return kept if kept.any() else keep


def _whole_tables(answers: np.ndarray, sizes: np.ndarray, page: Page) -> np.ndarray:
    """The answers, with one for all cells of a table of data: their mean, long cells counting more."""
    layout = laid_out(page, np.ones(len(sizes), np.bool_), sizes)
    table = table_of_blocks(layout, page)
    inside = table >= 0
    if not inside.any():
        return answers
    _, which = np.unique(table[inside], return_inverse=True)
    weights = np.minimum(sizes[inside], 100) + 5.0
    means = np.bincount(which, answers[inside] * weights) / np.bincount(which, weights)
    answers = answers.copy()
    answers[inside] = means[which]
    return answers


def decide(answers: np.ndarray, rows: np.ndarray, counts: np.ndarray, page: Page, threshold: float) -> np.ndarray:
    """Which blocks belong to the text, (B,) bool, given the model's `answers`, the `FEATURES` and the counts."""
    sizes = counts[:, CHARACTERS]
    links = counts[:, LINK_CHARACTERS]
    tags = page.tags[page.block_elements]
    answers = _whole_tables(answers, sizes, page)
    keep = answers >= threshold
    if sizes[keep].sum() < _TOO_SHORT:
        for wider in (
            answers >= threshold / 2,
            (rows[:, _CANDIDATE] > 0) & (2 * links < sizes),
            2 * links < sizes,
            np.ones(len(sizes), np.bool_),
        ):
            if sizes[wider].sum() >= 2 * max(1, sizes[keep].sum()):
                keep = keep | wider
            if sizes[keep].sum() >= _TOO_SHORT:
                break
    headings = (TRAITS[tags] & HEADING) != 0
    # a short line with a colon, such as "Further reading:", acts as a heading
    label = (sizes < 60) & (counts[:, CLOSED] == 1)
    keep = _without_lone_headings(keep, np.where(headings, tags - _H1 + 1, np.where(label, 7, 9)))
    return _one_title(keep, headings, rows, counts)


def _one_title(keep: np.ndarray, headings: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Drops a heading that says again what an earlier kept heading said, where it says the title."""
    titles = np.flatnonzero(keep & headings & (rows[:, _TITLE_SHARE] > 0.6))
    seen: set[int] = set()
    for block in titles:
        text = int(counts[block, HASH])
        if text in seen:
            keep[block] = False
        seen.add(text)
    return keep


#: With less text than this, text that CSS hides and the page's data for search engines are tried too.
_HARDLY_ANY = 200
_ARTICLE_BODY = re.compile(rb'"articleBody"\s*:\s*("(?:[^"\\]|\\.)*")')


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
    """The title in the page's head, without the name of the site behind a dash or bar."""
    from html import unescape

    start, end, og_start, og_end = page.title
    if og_end > og_start:
        return unescape(data[og_start:og_end].tobytes().decode("utf-8", "replace"))
    title = unescape(data[start:end].tobytes().decode("utf-8", "replace")).strip()
    parts = re.split(r"\s+[|–—·»«:-]+\s+", title[:500])
    return parts[0] if len(parts[0]) * 2 >= len(max(parts, key=len)) else max(parts, key=len)


def _article_body(html: bytes) -> str:
    """The text that a page of scripts gives to search engines (schema.org's articleBody)."""
    match = _ARTICLE_BODY.search(html)
    if not match:
        return ""
    try:
        text = json.loads(match[1], strict=False)
    except ValueError:
        return ""
    lines = [" ".join(re.sub(r"<[^<>]{1,200}>", " ", line).split()) for line in str(text).splitlines()]
    return "\n\n".join(line for line in lines if line)


#: Seconds of processor time that trafilatura may take for one page.
TIME_LIMIT = 10.0
_FUNCTION = "bessemer.data.extraction.trafilatura_worker:trafilatura_text"


class NoAnswerError(Exception):
    """trafilatura gave nothing for a page: it failed, or took too long. `kind` is the name under which that is counted."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class Trafilatura:
    """trafilatura with a limit on a page's processor time, in as many processes as pages are asked for at once.

    At most `processes` of them, by default one a core; they are started when they are needed. Safe to use from several threads.
    Raises ConfigError where trafilatura is not installed.
    """

    def __init__(
        self,
        time_limit: float = TIME_LIMIT,
        processes: int | None = None,
        function: Callable[[str, str | None], str] | str = _FUNCTION,
    ) -> None:
        if find_spec("trafilatura") is None:
            raise ConfigError(f"extractor: trafilatura needs the package trafilatura: {install_extra('trafilatura')}")
        self.time_limit = time_limit
        self._helpers = [Limited(function, time_limit) for _ in range(processes or usable_cores())]
        # last in, first out: no more helpers are started than are needed
        self._free: queue.LifoQueue[Limited] = queue.LifoQueue()
        for helper in self._helpers:
            self._free.put(helper)

    def __call__(self, html: str, url: str | None = None) -> str:
        """The text that trafilatura finds, "" where it finds none. Raises NoAnswerError when it fails or takes too long."""
        helper = self._free.get()
        try:
            return str(helper(html, url))
        except RefusedError as error:
            kind = "extraction_timeouts" if error.kind == "timed_out" else "extraction_failures"
            raise NoAnswerError(kind, f"trafilatura: {error}") from None
        finally:
            self._free.put(helper)

    def close(self) -> None:
        """Ends the processes; the next page would start another."""
        for helper in self._helpers:
            helper.close()


@cache
def shared_trafilatura() -> Trafilatura:
    """The one that `extract` uses in this process."""
    return Trafilatura()


def resiliparse_text(html: str) -> str:
    """The main content by resiliparse."""
    from resiliparse.extract.html2text import extract_plain_text

    return str(extract_plain_text(html, main_content=True, alt_texts=False, links=False))


def union(ours: str, theirs: str) -> str:
    """Our text with every paragraph of theirs that it lacks, each behind the one it follows there; none of it twice. Paragraphs
    are compared by their letters and digits alone, so that a list marker or a space makes no difference."""
    paragraphs = ours.split("\n\n") if ours else []
    whole = "\n".join(letters(paragraph) for paragraph in paragraphs)
    place = {letters(line): number for number, paragraph in enumerate(paragraphs) for line in paragraph.split("\n")}
    added: dict[int, list[str]] = {}
    seen: set[str] = set()
    anchor = -1
    for line in theirs.split("\n"):
        compared = letters(line)
        if not compared:
            continue
        if compared in place:
            anchor = place[compared]
        elif compared not in whole and compared not in seen:
            seen.add(compared)
            added.setdefault(anchor, []).append(line.strip())
    result = list(added.get(-1, []))
    for number, paragraph in enumerate(paragraphs):
        result += [paragraph, *added.get(number, [])]
    return "\n\n".join(result)


def extract_with(
    html: str, *, url: str | None, extractor: str, on_failure: Callable[[NoAnswerError], None] | None = None
) -> str:
    """The text by `resiliparse`, `trafilatura` or `union` (ours and trafilatura's). on_failure: called when trafilatura gives
    no answer, which is taken for no text."""
    if extractor == "resiliparse":
        return resiliparse_text(html)
    try:
        theirs = shared_trafilatura()(html, url)
    except NoAnswerError as error:
        theirs = ""
        if on_failure is not None:
            on_failure(error)
    return theirs if extractor == "trafilatura" else union(main_text(html.encode("utf-8", "replace")), theirs)


def letters(text: str) -> str:
    """The letters and digits of a text, by which texts of different extractors are compared."""
    return "".join(character for character in text.lower() if character.isalnum())


EXTRACTORS = ("bessemer", "resiliparse", "trafilatura", "union")


def extract(
    html: str | bytes,
    *,
    url: str | None = None,
    extractor: str = "bessemer",
    encoding: str | None = None,
    on_failure: Callable[[NoAnswerError], None] | None = None,
) -> str:
    """The main text of an HTML page as plain text with Markdown's headings, lists, tables and code; "" where there is none.

    `html` is decoded where it is bytes: a byte order mark, UTF-8, `encoding` (the server's word), the page's word, a guess.
    `url` helps the extractors that can use one. `extractor` is one of `EXTRACTORS`.
    `on_failure` is called when trafilatura fails on the page or takes too long; its text is then empty.
    Never raises for what is in the page. Raises ConfigError for an unknown extractor, or one that is not installed.
    """
    if extractor == "bessemer":
        return main_text(to_utf8(html, encoding=encoding))
    if extractor not in EXTRACTORS:
        raise ConfigError(f"no extractor '{extractor}'; there are {', '.join(EXTRACTORS)}")
    return extract_with(to_utf8(html, encoding=encoding).decode("utf-8"), url=url, extractor=extractor, on_failure=on_failure)
