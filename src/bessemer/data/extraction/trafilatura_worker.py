"""trafilatura on one page. It is imported by the processes that run it alone (`extract.py`)."""

from __future__ import annotations

from trafilatura import extract


def trafilatura_text(html: str, url: str | None) -> str:
    """The main text, without comments; "" where there is none."""
    return extract(html, url=url, include_comments=False) or ""
