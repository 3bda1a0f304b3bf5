"""Extraction of a web page's main text: by Bessemer's own model, by another library, or by both."""

from __future__ import annotations

from collections.abc import Callable

from bessemer.core.errors import ConfigError
from bessemer.data.extraction.encoding import to_utf8
from bessemer.data.extraction.main_text import main_text
from bessemer.data.extraction.peers import NoAnswerError, extract_with

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
    `url` helps the extractors that can use one. `extractor` is one of `EXTRACTORS`; see `peers.py` for the others.
    `on_failure` is called when trafilatura fails on the page or takes too long; its text is then empty.
    Never raises for what is in the page. Raises ConfigError for an unknown extractor, or one that is not installed.
    """
    if extractor == "bessemer":
        return main_text(to_utf8(html, encoding=encoding))
    if extractor not in EXTRACTORS:
        raise ConfigError(f"no extractor '{extractor}'; there are {', '.join(EXTRACTORS)}")
    return extract_with(to_utf8(html, encoding=encoding).decode("utf-8"), url=url, extractor=extractor, on_failure=on_failure)
