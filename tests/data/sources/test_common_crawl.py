from __future__ import annotations

import gzip
import json
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest

from bessemer.core.errors import SourceError
from bessemer.data.sources.html import Extraction
from bessemer.data.sources.registry import open_source, source_plugin
from bessemer.data.sources.source import Tally
from tests.data.sources.makers import found, page, plain_text, warc
from tests.data.sources.web import Counted


def crawl_site(site, pages):
    """A server that answers like Common Crawl's index and its archives."""
    archives = {"crawl-data/one.warc.gz": b"", "crawl-data/two.warc.gz": b""}
    lines = []
    for number, (url, content) in enumerate(pages):
        name = sorted(archives)[number % 2]
        record = gzip.decompress(warc([(url, content)], members=False))
        record = record[record.index(b"WARC/1", 10) : record.rindex(b"WARC/1")]
        member = gzip.compress(record)
        lines.append(
            {"url": url, "timestamp": f"2026{number:04d}", "status": "200", "mime-detected": "text/html", "filename": name}
            | {"offset": str(len(archives[name])), "length": str(len(member))}
        )
        archives[name] += member
    lines.append(lines[0] | {"mime-detected": "image/png", "url": "http://e.org/a.png"})

    def index(handler):
        query = parse_qs(urlsplit(handler.path).query)
        assert query["url"] == ["e.org"]
        if "showNumPages" in query:
            return 200, {}, b'{"pages": 2, "pageSize": 5, "blocks": 2}'
        part = lines[int(query["page"][0]) :: 2]
        return 200, {}, "\n".join([*map(json.dumps, part), "not json", ""]).encode()

    def archive(handler):
        first, _, last = handler.headers["Range"].removeprefix("bytes=").partition("-")
        content = archives[handler.path[1:]][int(first) : int(last) + 1]
        return 206, {"Content-Type": "application/octet-stream"}, content

    site.answers["/CC-MAIN-2026-01-index"] = index
    for name in archives:
        site.answers[f"/{name}"] = archive
    return lines


def crawl_source(folder, site, **settings):
    settings = {"crawl": "CC-MAIN-2026-01", "domains": "e.org", "index": site.url, "data": site.url} | settings
    settings |= {"allow_private": True, "retries": 0, "delay_seconds": 0}
    source = open_source(source_plugin("common_crawl").settings.parse(settings), folder, folder / "cache")
    return replace(source, warc=replace(source.warc, extraction=Extraction(function=plain_text)), clock=Counted().clock())


PAGES = [(f"http://e.org/{n}", page(f"<p>Page {n}</p>")) for n in range(6)]


def test_the_pages_of_a_domain_are_found_by_the_index_and_fetched_by_their_ranges(site, tmp_path):
    crawl_site(site, PAGES)
    read = [document for _, _, document in found(crawl_source(tmp_path, site))]
    assert sorted(document.text for document in read) == [f"Page {n}" for n in range(6)]
    asked = len(site.asked)
    assert len(found(crawl_source(tmp_path, site))) == 6
    assert len(site.asked) == asked


def test_the_latest_capture_of_a_page_counts(site, tmp_path):
    crawl_site(site, [*PAGES[:2], (PAGES[0][0], page("<p>Newer</p>"))])
    read = {document.url: document.text for _, _, document in found(crawl_source(tmp_path, site))}
    assert read == {"http://e.org/0": "Newer", "http://e.org/1": "Page 1"}


def test_a_range_that_is_no_whole_record_is_counted(site, tmp_path):
    lines = crawl_site(site, PAGES)
    lines[3]["length"] = str(int(lines[3]["length"]) - 5)
    lines[4]["offset"] = str(int(lines[4]["offset"]) + 5)
    tally = Tally()
    read = [document.text for _, _, document in found(crawl_source(tmp_path, site), tally)]
    assert sorted(read) == ["Page 0", "Page 1", "Page 2", "Page 5"]
    assert tally.counts == {"damaged_records": 2}


def test_an_index_that_does_not_answer_is_named(site, tmp_path):
    site.answers["/CC-MAIN-2026-01-index"] = (500, {}, b"")
    with pytest.raises(SourceError, match=r"common_crawl: the index http://127.* does not answer for e.org: status 500"):
        crawl_source(tmp_path, site).units()


def test_a_domain_that_the_crawl_does_not_know_is_named(site, tmp_path):
    with pytest.raises(SourceError, match=r"CC-MAIN-2026-01 has no page of e.org"):
        crawl_source(tmp_path, site).units()
