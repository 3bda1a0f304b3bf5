"""Source `urls`: lists of addresses and sitemaps, fetched politely into the cache once, then read like any web archive."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_value
from bessemer.core.interrupts import thread_pool
from bessemer.core.object_storage import Place
from bessemer.core.progress import Progress, Silent
from bessemer.data.sources.config import UrlsSource
from bessemer.data.sources.document import Tally, encodable
from bessemer.data.sources.formats.pages import urlsplit_host
from bessemer.data.sources.formats.warc import Warc, warc_format
from bessemer.data.sources.formats.xml import local_name, parse_xml
from bessemer.data.sources.http.fetch import Clock, FetchError, Limits, fetch, normal_url
from bessemer.data.sources.http.page_store import PageStore
from bessemer.data.sources.http.politeness import Politeness
from bessemer.data.sources.io.cutting import bounded_lines
from bessemer.data.sources.io.paths import content_fingerprint, find_files
from bessemer.data.sources.io.streams import open_stream
from bessemer.data.sources.origins.fetched import fetch_limits, read_fetched, say_failures
from bessemer.data.sources.source import PositionedDocument, Unit

_LIST_SUFFIXES = (".txt", ".urls", ".lst", ".csv")
_LONGEST_ADDRESS = 8192
# https://www.sitemaps.org/protocol.html
_LARGEST_SITEMAP = 50 << 20
_DEEPEST_INDEX = 3


@dataclass(frozen=True)
class Urls:
    """Pages at `urls`, in the files `lists` (an address a line) and in `sitemaps`.

    `units` fetches what is not in the cache yet; everything after it is offline.
    """

    cache: Path
    folder: Path
    limits: Limits
    warc: Warc
    urls: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    sitemaps: tuple[str, ...] = ()
    max_pages: int | None = None
    delay_seconds: float = 1.0
    hosts_at_once: int = 8
    license: str | None = None
    clock: Clock = field(default_factory=Clock)

    def units(self, progress: Progress | None = None) -> list[Unit]:
        progress = progress or Silent()
        with PageStore(self._store_folder()) as store:
            if not store.is_complete:
                self._crawl(store, progress)
                store.complete()
            say_failures(store, progress)
            if not (units := store.units()):
                raise SourceError(f"urls: no page could be fetched{_first_failure(store)}")
            return units

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        yield from read_fetched(self.warc, unit, start, tally, self.license)

    def fingerprint(self) -> Any:
        lists = find_files(list(self.lists), self.folder, _is_list, "/".join(_LIST_SUFFIXES)) if self.lists else {}
        return {
            "urls": sorted(self.urls),
            "lists": sorted(content_fingerprint(path) for path in lists.values()),
            "sitemaps": sorted(self.sitemaps),
            "max_pages": self.max_pages,
        }

    def _store_folder(self) -> Path:
        return self.cache / f"urls-{hash_value(self.fingerprint(), bits=64)}"

    def _crawl(self, store: PageStore, progress: Progress) -> None:
        """Fetch every address without an outcome: hosts side by side, a host's pages one after the other."""
        politeness = Politeness(self.limits, self.delay_seconds, self.clock)
        by_host: dict[str, list[str]] = defaultdict(list)
        wanted = self._wanted(store, politeness)
        for url in wanted:
            if url not in store.outcomes:
                by_host[urlsplit_host(url) or ""].append(url)
        with (
            progress.task("fetching", total=len(wanted), unit="pages", completed=len(store.outcomes)) as task,
            thread_pool(self.hosts_at_once) as pool,
        ):

            def visit(urls: list[str]) -> None:
                for url in urls:
                    self._fetch_into(store, url, politeness)
                    task.advance(1)

            # raises what a thread raised: a full disk, say
            for _ in pool.map(visit, by_host.values()):
                pass

    def _fetch_into(self, store: PageStore, url: str, politeness: Politeness) -> None:
        try:
            answer = fetch(url, self.limits, may_visit=politeness.may_visit, clock=self.clock)
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
            if self.max_pages is not None and len(wanted) >= self.max_pages:
                break
        return list(wanted)

    def _addresses(self, politeness: Politeness, store: PageStore) -> Iterator[str]:
        yield from self.urls
        if self.lists:
            for path in find_files(list(self.lists), self.folder, _is_list, "/".join(_LIST_SUFFIXES)).values():
                yield from _listed(path)
        for sitemap in self.sitemaps:
            yield from self._sitemap(sitemap, politeness, store)

    def _sitemap(self, sitemap: str, politeness: Politeness, store: PageStore) -> Iterator[str]:
        """The addresses of a sitemap and those it lists, of its own host alone (the protocol's rule)."""
        waiting, seen = [(sitemap, 0)], {sitemap}
        while waiting:
            current, depth = waiting.pop(0)
            try:
                answer = fetch(current, self._sitemap_limits(), may_visit=politeness.may_visit, clock=self.clock)
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

    def _sitemap_limits(self) -> Limits:
        return Limits(
            self.limits.user_agent,
            self.limits.seconds,
            _LARGEST_SITEMAP,
            self.limits.max_redirects,
            self.limits.retries,
            self.limits.allow_private,
        )


def open_urls(settings: UrlsSource, folder: Path, cache: Path) -> Urls:
    """The source `urls`, whose lists are relative to `folder` and whose pages lie in `cache`."""
    return Urls(
        cache,
        folder,
        fetch_limits(settings),
        warc_format(settings, by_url=True),
        urls=tuple(settings.urls),
        lists=tuple(settings.lists),
        sitemaps=tuple(settings.sitemaps),
        max_pages=settings.max_pages,
        delay_seconds=settings.delay_seconds,
        hosts_at_once=settings.hosts_at_once,
        license=settings.license,
    )


def _first_failure(store: PageStore) -> str:
    failure = next(((url, why) for url, (kind, why) in store.outcomes.items() if kind != "page"), None)
    return f"; the first address, {failure[0]}: {failure[1]}" if failure else ": no address was given"


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
