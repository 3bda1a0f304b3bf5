"""Source `common_crawl`: the pages of some domains out of a monthly crawl, found by its index, fetched record by record.

The index (a CDX server) says in which WARC file and where in it each page stands; the range is fetched and kept as the
gzip member that it is. Both servers are settings, so that a mirror or a test can stand in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_value
from bessemer.core.interrupts import thread_pool
from bessemer.core.progress import Progress, Silent
from bessemer.data.sources.config import CommonCrawlSource
from bessemer.data.sources.document import Tally, encodable
from bessemer.data.sources.formats.records import parse_json
from bessemer.data.sources.formats.warc import Warc, warc_format
from bessemer.data.sources.http.fetch import Answer, Clock, FetchError, Limits, fetch
from bessemer.data.sources.http.page_store import PageStore
from bessemer.data.sources.io.streams import whole_gzip_member
from bessemer.data.sources.origins.fetched import fetch_limits, read_fetched, say_failures
from bessemer.data.sources.source import PositionedDocument, Unit

_LONGEST_RECORD = 64 << 20
_PAGE_TYPES = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True)
class _Capture:
    """A page in the crawl: where its record stands."""

    url: str
    timestamp: str
    file: str
    offset: int
    length: int

    @property
    def name(self) -> str:
        """What the page store calls it."""
        return f"{self.url} {self.timestamp}"


@dataclass(frozen=True)
class CommonCrawl:
    """The latest capture of each page of `domains` in one crawl."""

    cache: Path
    crawl: str
    domains: tuple[str, ...]
    limits: Limits
    warc: Warc
    index: str = "https://index.commoncrawl.org"
    data: str = "https://data.commoncrawl.org"
    max_pages: int | None = None
    delay_seconds: float = 0.2
    requests_at_once: int = 4
    license: str | None = None
    clock: Clock = field(default_factory=Clock)

    def units(self, progress: Progress | None = None) -> list[Unit]:
        progress = progress or Silent()
        with PageStore(self.cache / f"common-crawl-{hash_value(self.fingerprint(), bits=64)}") as store:
            if not store.is_complete:
                self._fetch_all(store, progress)
                store.complete()
            say_failures(store, progress)
            if not (units := store.units()):
                raise SourceError(f"common_crawl: {self.crawl} has no page of {', '.join(self.domains)}")
            return units

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        yield from read_fetched(self.warc, unit, start, tally, self.license)

    def fingerprint(self) -> Any:
        return {"crawl": self.crawl, "domains": sorted(self.domains), "max_pages": self.max_pages}

    def _fetch_all(self, store: PageStore, progress: Progress) -> None:
        captures = [capture for capture in self._captures() if capture.name not in store.outcomes]
        with (
            progress.task("fetching", total=len(captures), unit="pages") as task,
            thread_pool(self.requests_at_once) as pool,
        ):

            def get(capture: _Capture) -> None:
                self._fetch_into(store, capture)
                task.advance(1)

            for _ in pool.map(get, captures):
                pass

    def _fetch_into(self, store: PageStore, capture: _Capture) -> None:
        span = {"Range": f"bytes={capture.offset}-{capture.offset + capture.length - 1}", "Accept-Encoding": "identity"}
        try:
            if not 0 < capture.length <= _LONGEST_RECORD:
                raise FetchError("too_large", f"a record of {capture.length:,} bytes")
            answer = fetch(
                f"{self.data.rstrip('/')}/{capture.file}",
                self.limits,
                may_visit=self._pace,
                extra=span,
                clock=self.clock,
                expected=(206,),
            )
            if not whole_gzip_member(answer.body):
                raise FetchError("damaged_records", "what came is not one whole gzip member")
        except FetchError as error:
            store.add_failure(capture.name, error.kind, str(error))
        else:
            store.add_member(capture.name, answer.body)

    def _captures(self) -> list[_Capture]:
        """The latest capture of each page, domain by domain, in the order of addresses; at most `max_pages`."""
        latest: dict[str, _Capture] = {}
        for domain in self.domains:
            for page in range(self._index_pages(domain)):
                for line in self._ask(domain, {"page": str(page)}).body.decode("utf-8", errors="replace").splitlines():
                    capture = _capture(line)
                    if capture and (capture.url not in latest or latest[capture.url].timestamp < capture.timestamp):
                        latest[capture.url] = capture
                if self.max_pages is not None and len(latest) >= self.max_pages:
                    break
        found = sorted(latest.values(), key=lambda capture: (capture.url, capture.timestamp))
        return found[: self.max_pages]

    def _index_pages(self, domain: str) -> int:
        answer = self._ask(domain, {"showNumPages": "true"})
        try:
            said = parse_json(answer.body)
            return int(said["pages"] if isinstance(said, dict) else said)
        except (ValueError, TypeError, KeyError):
            raise SourceError(f"common_crawl: the index {self.index} gave no number of pages for {domain}") from None

    def _ask(self, domain: str, more: dict[str, str]) -> Answer:
        """An answer of the index. Raises SourceError when it gives none; a domain that it does not know is no error."""
        query = {"url": domain, "matchType": "domain", "output": "json", "filter": "=status:200"} | more
        address = f"{self.index.rstrip('/')}/{self.crawl}-index?{urlencode(query)}"
        try:
            return fetch(address, self.limits, may_visit=self._pace, clock=self.clock)
        except FetchError as error:
            if error.kind == "status_404":
                return Answer(address, 200, [], b"0" if "showNumPages" in more else b"")
            raise SourceError(f"common_crawl: the index {self.index} does not answer for {domain}: {error}") from None

    def _pace(self, url: str) -> None:
        self.clock.sleep(self.delay_seconds)


def open_common_crawl(settings: CommonCrawlSource, folder: Path, cache: Path) -> CommonCrawl:
    """The source `common_crawl`, whose pages lie in `cache`."""
    return CommonCrawl(
        cache,
        settings.crawl,
        tuple(settings.domains),
        fetch_limits(settings),
        warc_format(settings),
        index=settings.index,
        data=settings.data,
        max_pages=settings.max_pages,
        delay_seconds=settings.delay_seconds,
        requests_at_once=settings.requests_at_once,
        license=settings.license,
    )


def _capture(line: str) -> _Capture | None:
    """A line of the index; None for one that is not a page or not what an index gives."""
    try:
        said = parse_json(line)
        kind = said.get("mime-detected") or said.get("mime") or ""
        if kind not in _PAGE_TYPES or str(said.get("status", "200")) != "200" or ".." in said["filename"]:
            return None
        place = (int(said["offset"]), int(said["length"]))
        return _Capture(encodable(str(said["url"])), str(said["timestamp"]), str(said["filename"]), *place)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
