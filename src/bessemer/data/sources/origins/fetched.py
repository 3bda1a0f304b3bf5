"""Fetched sources: the limits of their requests, and the reading of their pages out of the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bessemer.core.progress import Progress
from bessemer.data.sources.config import FetchingSource
from bessemer.data.sources.document import Tally
from bessemer.data.sources.formats.warc import Warc
from bessemer.data.sources.http.fetch import Limits
from bessemer.data.sources.http.page_store import PageStore, failures_in
from bessemer.data.sources.io.archives import Surroundings, plain_entry
from bessemer.data.sources.source import PositionedDocument, Unit


def fetch_limits(settings: FetchingSource) -> Limits:
    """What one request may cost, and where it may go."""
    # some bytes more than a document may have: a page is larger than its text, and an archive's record than its page
    most = 4 * settings.max_document_bytes + (1 << 20)
    return Limits(settings.user_agent, settings.seconds, most, retries=settings.retries, allow_private=settings.allow_private)


def read_fetched(warc: Warc, unit: Unit, start: int, tally: Tally, license: str | None) -> Iterator[PositionedDocument]:
    """The pages of one file of a store. With the first file, the addresses that brought none are counted."""
    ((name, path),) = unit.files
    assert isinstance(path, Path), "what was fetched lies in the cache"
    if start == 0:
        tally.files += 1
        tally.bytes += unit.size_bytes
        if name == min(other.name for other in path.parent.glob("pages-*.warc.gz")):
            for url, (kind, why) in sorted(failures_in(path.parent).items()):
                tally.set_aside(kind, url, why)
    yield from warc.read(plain_entry(name, path, Surroundings(license)), start, tally)


def say_failures(store: PageStore, progress: Progress) -> None:
    """Say in one line how many addresses brought nothing, by kind."""
    failures = store.failures()
    if failures:
        what = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in failures.most_common())
        progress.say(f"  {failures.total():,} addresses brought no page: {what}")
