from __future__ import annotations

import gzip
import socket
from contextlib import closing
from dataclasses import replace

import pytest

from bessemer.core.errors import SourceError
from bessemer.data.sources.html import Extraction
from bessemer.data.sources.registry import open_source, source_plugin
from bessemer.data.sources.source import Tally
from bessemer.data.sources.warc import PageStore
from tests.data.sources.makers import found, plain_text
from tests.data.sources.web import Counted


def urls_source(folder, clock=None, **settings):
    settings = {"source": "urls", "allow_private": True, "retries": 1, "seconds": 5, "delay_seconds": 0} | settings
    source = open_source(source_plugin("urls").settings.parse(settings), folder, folder / "cache")
    source = replace(source, warc=replace(source.warc, extraction=Extraction(function=plain_text)))
    return replace(source, clock=(clock or Counted()).clock())


def test_pages_are_fetched_once_and_read_from_the_cache_ever_after(site, tmp_path):
    for number in range(3):
        site.html(f"/{number}", f"Page {number}")
    (tmp_path / "list.txt").write_text(
        f"# pages\n{site.url}/1\n{site.url}/2\nnot an address\n{site.url}/gone\n", encoding="utf-8"
    )
    settings = {"urls": f"{site.url}/0", "lists": "list.txt", "license": "CC0-1.0"}
    tally = Tally()
    read = [document for _, _, document in found(urls_source(tmp_path, **settings), tally)]
    assert [document.text for document in read] == ["Page 0", "Page 1", "Page 2"]
    assert [document.locator for document in read] == [f"{site.url}/{n}" for n in range(3)]
    assert {document.license for document in read} == {"CC0-1.0"}
    assert tally.counts == {"status_404": 1}
    asked = len(site.asked)
    assert [document for _, _, document in found(urls_source(tmp_path, **settings))] == read
    assert len(site.asked) == asked


def test_robots_txt_is_obeyed_and_its_delay_kept(site, tmp_path):
    rules = "User-agent: *\nDisallow: /private\nCrawl-delay: 3\n\nUser-agent: GPTBot\nDisallow: /open\n"
    site.answers["/robots.txt"] = (200, {"Content-Type": "text/plain"}, rules.encode())
    for path in ("/private/a", "/open/b", "/free"):
        site.html(path, path)
    counted = Counted()
    source = urls_source(tmp_path, counted, urls=[f"{site.url}{path}" for path in ("/private/a", "/open/b", "/free")])
    tally = Tally()
    read = {document.locator: document for _, _, document in found(source, tally)}
    assert site.asked_pages() == ["/open/b", "/free"]
    assert read[f"{site.url}/open/b"].metadata["opt_out"] == "robots.txt closed to training"
    assert "opt_out" not in read[f"{site.url}/free"].metadata
    assert tally.counts["forbidden_by_robots"] == 1
    assert 3.0 in counted.waits


def test_a_site_whose_robots_txt_fails_is_not_visited(site, tmp_path):
    site.answers["/robots.txt"] = (500, {}, b"")
    site.html("/a", "x")
    with pytest.raises(SourceError, match=r"no page could be fetched; the first address, .*: its robots.txt forbids it"):
        urls_source(tmp_path, urls=[f"{site.url}/a"]).units()
    assert site.asked_pages() == []


def test_ai_txt_is_heard(site, tmp_path):
    site.answers["/ai.txt"] = (200, {"Content-Type": "text/plain"}, b"User-Agent: *\nDisallow: /\n")
    site.html("/a", "x", **{"X-Robots-Tag": "noindex, noai"})
    ((_, _, document),) = found(urls_source(tmp_path, urls=[f"{site.url}/a"]))
    assert document.metadata["opt_out"] == "noai, ai.txt"


def test_requests_to_a_host_keep_their_distance(site, tmp_path):
    for number in range(4):
        site.html(f"/{number}", f"Page {number}")
    counted = Counted()
    urls_source(tmp_path, counted, urls=[f"{site.url}/{n}" for n in range(4)], delay_seconds=2.0).units()
    assert counted.waits == [2.0] * 5  # robots.txt, ai.txt and four pages


def test_sitemaps_are_followed_on_their_own_host_alone(site, tmp_path):
    for path in ("/a", "/b"):
        site.html(path, f"Page {path}")
    maps = "".join(f"<sitemap><loc>{site.url}{path}</loc></sitemap>" for path in ("/s.xml.gz", "/index.xml"))
    index = f"<sitemapindex>{maps}</sitemapindex>"
    entries = "".join(
        f"<url><loc>{url}</loc></url>" for url in (f"{site.url}/a", f"{site.url}/b", "http://elsewhere.example/c")
    )
    site.answers["/index.xml"] = (200, {}, index.encode())
    site.answers["/s.xml.gz"] = (200, {}, gzip.compress(f"<urlset>{entries}</urlset>".encode()))
    tally = Tally()
    read = [document.text for _, _, document in found(urls_source(tmp_path, sitemaps=f"{site.url}/index.xml"), tally)]
    assert sorted(read) == ["Page /a", "Page /b"]
    assert tally.counts == {}, "the other host was asked"
    assert site.asked.count("/index.xml") == 1


def test_at_most_so_many_pages_are_fetched(site, tmp_path):
    for number in range(5):
        site.html(f"/{number}", f"Page {number}")
    source = urls_source(tmp_path, urls=[f"{site.url}/{n}" for n in range(5)], max_pages=2)
    assert len(found(source)) == 2


@pytest.mark.parametrize("lost", [1, 40, 1000])
def test_a_killed_crawl_goes_on_where_its_journal_ends(site, tmp_path, lost):
    """As a kill leaves it: the journal without its last bytes, the archive with more than the journal knows of."""
    for number in range(6):
        site.html(f"/{number}", f"Page {number}")
    source = urls_source(tmp_path, urls=[f"{site.url}/{n}" for n in range(6)])
    whole = [document.text for _, _, document in found(source)]
    (store,) = (tmp_path / "cache").iterdir()
    (store / "complete").unlink()
    journal = store / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-lost] if lost < 1000 else b"")
    (archive,) = store.glob("*.gz")
    with archive.open("ab") as stream:
        stream.write(b"half a member")
    before = len(site.asked_pages())
    tally = Tally()
    assert sorted(document.text for _, _, document in found(source, tally)) == whole
    assert tally.counts == {}
    assert len(site.asked_pages()) - before == {1: 1, 40: 1, 1000: 6}[lost]


def test_what_may_heal_is_asked_again_by_the_next_run_and_what_will_not_is_not(tmp_path):
    with closing(PageStore(tmp_path)) as store:
        store.add_failure("http://a/", "timed_out", "slow")
        store.add_failure("http://b/", "status_503", "busy")
        store.add_failure("http://c/", "status_404", "gone")
    with closing(PageStore(tmp_path)) as store:
        assert set(store.outcomes) == {"http://c/"}


def test_a_page_closed_to_the_network_is_a_failure_and_no_crash(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    with pytest.raises(SourceError, match="no page could be fetched"):
        urls_source(tmp_path, urls=[url]).units()


def test_a_redirect_to_what_robots_txt_forbids_is_not_followed(site, tmp_path):
    site.answers["/robots.txt"] = (200, {"Content-Type": "text/plain"}, b"User-agent: *\nDisallow: /private\n")
    site.answers["/go"] = (302, {"Location": "/private/a"}, b"")
    site.html("/private/a", "private")
    site.html("/b", "open")
    tally = Tally()
    read = found(urls_source(tmp_path, urls=[f"{site.url}/go", f"{site.url}/b"]), tally)
    assert [document.text for _, _, document in read] == ["open"]
    assert tally.counts == {"forbidden_by_robots": 1}
    assert "/private/a" not in site.asked
