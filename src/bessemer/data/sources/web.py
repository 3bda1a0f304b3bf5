"""Sources that fetch web pages: `urls` (addresses and sitemaps) and `common_crawl` (pages of some domains of a crawl).

Pages are fetched politely and once, into the cache, and then read like any web archive. Common Crawl's index (a CDX server)
gives the WARC file and the place of each page; the range is fetched and kept as the gzip member that it is. Both servers are
settings, so that a mirror or a test can stand in.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from bessemer.core.concurrency import thread_pool
from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_value
from bessemer.core.object_storage import Place
from bessemer.core.progress import Progress, Silent
from bessemer.data.sources.html import urlsplit_host
from bessemer.data.sources.io.archives import Surroundings, plain_entry
from bessemer.data.sources.io.fetch import Clock, FetchError, Limits, Politeness, Response, fetch, normal_url
from bessemer.data.sources.io.file_source import bounded_lines, parse_json
from bessemer.data.sources.io.paths import content_fingerprint, find_files
from bessemer.data.sources.io.streams import open_stream, whole_gzip_member
from bessemer.data.sources.markup import local_name, parse_xml
from bessemer.data.sources.registry import CommonCrawlSource, FetchingSource, UrlsSource
from bessemer.data.sources.source import PositionedDocument, Tally, Unit, encodable
from bessemer.data.sources.warc import PageStore, Warc, failures_in


def fetch_limits(settings: FetchingSource) -> Limits:
    """Limits of one request: on time, size, redirects, retries and addresses."""
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


@dataclass(frozen=True)
class FetchedPages:
    """Pages that are fetched into a store in the cache, once, and read from there; everything after `units` is offline."""

    settings: Any
    cache: Path
    warc: Warc
    clock: Clock = field(default_factory=Clock)

    def units(self, progress: Progress | None = None) -> list[Unit]:
        progress = progress or Silent()
        kind = self.settings.source.replace("_", "-")
        with closing(PageStore(self.cache / f"{kind}-{hash_value(self.fingerprint(), bits=64)}")) as store:
            if not store.is_complete:
                self._fetch_all(store, progress)
                store.complete()
            say_failures(store, progress)
            if not (units := store.units()):
                raise SourceError(f"{self.settings.source}: {self._nothing(store)}")
            return units

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        yield from read_fetched(self.warc, unit, start, tally, self.settings.license)

    def fingerprint(self) -> Any:
        raise NotImplementedError

    def _fetch_all(self, store: PageStore, progress: Progress) -> None:
        """Fetch what has no outcome in the store."""
        raise NotImplementedError

    def _nothing(self, store: PageStore) -> str:
        """The reason for having no page, for a message."""
        raise NotImplementedError


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
        """Its name in the page store."""
        return f"{self.url} {self.timestamp}"


@dataclass(frozen=True)
class CommonCrawl(FetchedPages):
    """The latest capture of each page of some domains in one crawl."""

    settings: CommonCrawlSource

    def fingerprint(self) -> Any:
        return {"crawl": self.settings.crawl, "domains": sorted(self.settings.domains), "max_pages": self.settings.max_pages}

    def _nothing(self, store: PageStore) -> str:
        return f"{self.settings.crawl} has no page of {', '.join(self.settings.domains)}"

    def _fetch_all(self, store: PageStore, progress: Progress) -> None:
        captures = [capture for capture in self._captures() if capture.name not in store.outcomes]
        with (
            progress.task("fetching", total=len(captures), unit="pages") as task,
            thread_pool(self.settings.requests_at_once) as pool,
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
                f"{self.settings.data.rstrip('/')}/{capture.file}",
                fetch_limits(self.settings),
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
        for domain in self.settings.domains:
            for page in range(self._index_pages(domain)):
                for line in self._ask(domain, {"page": str(page)}).body.decode("utf-8", errors="replace").splitlines():
                    capture = _capture(line)
                    if capture and (capture.url not in latest or latest[capture.url].timestamp < capture.timestamp):
                        latest[capture.url] = capture
                if self.settings.max_pages is not None and len(latest) >= self.settings.max_pages:
                    break
        captures = sorted(latest.values(), key=lambda capture: (capture.url, capture.timestamp))
        return captures[: self.settings.max_pages]

    def _index_pages(self, domain: str) -> int:
        answer = self._ask(domain, {"showNumPages": "true"})
        try:
            said = parse_json(answer.body)
            return int(said["pages"] if isinstance(said, dict) else said)
        except (ValueError, TypeError, KeyError):
            raise SourceError(f"common_crawl: the index {self.settings.index} gave no number of pages for {domain}") from None

    def _ask(self, domain: str, more: dict[str, str]) -> Response:
        """An answer of the index. Raises SourceError when it gives none; a domain that it does not know is no error."""
        query = {"url": domain, "matchType": "domain", "output": "json", "filter": "=status:200"} | more
        address = f"{self.settings.index.rstrip('/')}/{self.settings.crawl}-index?{urlencode(query)}"
        try:
            return fetch(address, fetch_limits(self.settings), may_visit=self._pace, clock=self.clock)
        except FetchError as error:
            if error.kind == "status_404":
                return Response(address, 200, [], b"0" if "showNumPages" in more else b"")
            raise SourceError(f"common_crawl: the index {self.settings.index} does not answer for {domain}: {error}") from None

    def _pace(self, url: str) -> None:
        self.clock.sleep(self.settings.delay_seconds)


def open_common_crawl(settings: CommonCrawlSource, folder: Path, cache: Path) -> CommonCrawl:
    """The source `common_crawl`, whose pages lie in `cache`."""
    return CommonCrawl(settings, cache, Warc(settings))


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


_LIST_SUFFIXES = (".txt", ".urls", ".lst", ".csv")
_LONGEST_ADDRESS = 8192
# https://www.sitemaps.org/protocol.html
_LARGEST_SITEMAP = 50 << 20
_DEEPEST_INDEX = 3


@dataclass(frozen=True)
class Urls(FetchedPages):
    """Pages at `urls`, in the files `lists` (an address a line) and in `sitemaps`. folder: what `lists` are relative to."""

    settings: UrlsSource
    folder: Path = Path()

    def fingerprint(self) -> Any:
        lists = find_files(self.settings.lists, self.folder, _is_list, "/".join(_LIST_SUFFIXES)) if self.settings.lists else {}
        return {
            "urls": sorted(self.settings.urls),
            "lists": sorted(content_fingerprint(path) for path in lists.values()),
            "sitemaps": sorted(self.settings.sitemaps),
            "max_pages": self.settings.max_pages,
        }

    def _nothing(self, store: PageStore) -> str:
        failure = next(((url, why) for url, (kind, why) in store.outcomes.items() if kind != "page"), None)
        return "no page could be fetched" + (
            f"; the first address, {failure[0]}: {failure[1]}" if failure else ": no address was given"
        )

    def _fetch_all(self, store: PageStore, progress: Progress) -> None:
        """Fetch every address without an outcome: hosts side by side, a host's pages one after the other."""
        politeness = Politeness(fetch_limits(self.settings), self.settings.delay_seconds, self.clock)
        by_host: dict[str, list[str]] = defaultdict(list)
        wanted = self._wanted(store, politeness)
        for url in wanted:
            if url not in store.outcomes:
                by_host[urlsplit_host(url) or ""].append(url)
        with (
            progress.task("fetching", total=len(wanted), unit="pages", completed=len(store.outcomes)) as task,
            thread_pool(self.settings.hosts_at_once) as pool,
        ):

            def visit(urls: list[str]) -> None:
                for url in urls:
                    self._fetch_into(store, url, politeness)
                    task.advance(1)

            # re-raises a thread's error, such as a full disk
            for _ in pool.map(visit, by_host.values()):
                pass

    def _fetch_into(self, store: PageStore, url: str, politeness: Politeness) -> None:
        try:
            answer = fetch(url, fetch_limits(self.settings), may_visit=politeness.may_visit, clock=self.clock)
            store.add_page(url, answer, politeness.opt_out(answer.url))
        except FetchError as error:
            store.add_failure(url, error.kind, str(error))

    def _wanted(self, store: PageStore, politeness: Politeness) -> list[str]:
        """The addresses in the order of the settings, each once, at most `max_pages`."""
        wanted: dict[str, None] = {}
        for address in self._addresses(politeness, store):
            try:
                wanted[normal_url(address)] = None
            except FetchError as error:
                store.add_failure(encodable(address), error.kind, str(error))
            if self.settings.max_pages is not None and len(wanted) >= self.settings.max_pages:
                break
        return list(wanted)

    def _addresses(self, politeness: Politeness, store: PageStore) -> Iterator[str]:
        yield from self.settings.urls
        if self.settings.lists:
            for path in find_files(self.settings.lists, self.folder, _is_list, "/".join(_LIST_SUFFIXES)).values():
                yield from _listed(path)
        for sitemap in self.settings.sitemaps:
            yield from self._sitemap(sitemap, politeness, store)

    def _sitemap(self, sitemap: str, politeness: Politeness, store: PageStore) -> Iterator[str]:
        """The addresses of a sitemap and those it lists, of its own host alone (the protocol's rule)."""
        waiting, seen = [(sitemap, 0)], {sitemap}
        while waiting:
            current, depth = waiting.pop(0)
            try:
                answer = fetch(
                    current,
                    replace(fetch_limits(self.settings), max_bytes=_LARGEST_SITEMAP),
                    may_visit=politeness.may_visit,
                    clock=self.clock,
                )
                root = parse_xml(_expanded(answer.body))
            except (FetchError, ValueError) as error:
                store.add_failure(encodable(current), "unreadable_sitemaps", str(error))
                continue
            host = urlsplit_host(answer.url)
            for element in root.iter():
                address = (element.text or "").strip() if local_name(element) == "loc" else ""
                if not address or urlsplit_host(address) != host:
                    continue
                if local_name(element.getparent()) == "url":
                    yield address
                elif depth < _DEEPEST_INDEX and address not in seen:
                    seen.add(address)
                    waiting.append((address, depth + 1))


def open_urls(settings: UrlsSource, folder: Path, cache: Path) -> Urls:
    """The source `urls`, whose lists are relative to `folder` and whose pages lie in `cache`."""
    return Urls(settings, cache, Warc(settings, by_url=True), folder=folder)


def _is_list(name: str) -> bool:
    return name.lower().endswith(_LIST_SUFFIXES) or name.lower().endswith(tuple(f"{suffix}.gz" for suffix in _LIST_SUFFIXES))


def _listed(path: Place) -> Iterator[str]:
    """The addresses of a list: the first field of each line that is not a comment."""
    with open_stream(path) as stream:
        for _, _, line in bounded_lines(stream, _LONGEST_ADDRESS):
            text = (line or b"").decode("utf-8", errors="replace").strip().lstrip("\ufeff")
            address = text.split(",")[0].split("\t")[0].strip().strip('"')
            if address.lower().startswith(("http://", "https://")):
                yield address


def _expanded(body: bytes) -> bytes:
    """A sitemap's bytes, expanded where the file itself is gzip. Raises ValueError when it is damaged or too large."""
    if body[:2] != b"\x1f\x8b":
        return body
    try:
        content = zlib.decompressobj(31).decompress(body, _LARGEST_SITEMAP + 1)
    except zlib.error as error:
        raise ValueError(f"damaged gzip ({error})") from None
    if len(content) > _LARGEST_SITEMAP:
        raise ValueError(f"over {_LARGEST_SITEMAP:,} bytes")
    return content
