from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from bessemer.core.errors import SourceError
from bessemer.data.sources.config import SOURCES
from bessemer.data.sources.document import Tally
from bessemer.data.sources.fetch import Clock, FetchError, Limits, fetch, fetch_once, is_public, normal_url
from bessemer.data.sources.opening import open_source
from bessemer.data.sources.page_store import PageStore
from bessemer.data.sources.pages import Extraction
from tests.data.sources.makers import found, page, plain_text, warc

LOCAL = Limits("testbot/1", seconds=5, max_bytes=100_000, retries=2, allow_private=True)


class Counted:
    """A clock that never waits and keeps what it was asked to wait."""

    def __init__(self):
        self.waits, self.time = [], 0.0
        self._lock = threading.Lock()

    def sleep(self, seconds):
        with self._lock:
            self.waits.append(seconds)
            self.time += seconds

    def now(self):
        return self.time

    def clock(self):
        return Clock(self.sleep, self.now)


class Site:
    """A web server on this machine whose answers are functions of the request, by path."""

    def __init__(self):
        self.answers, self.asked = {}, []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append(self.path)
                answer = site.answers.get(self.path.partition("?")[0])
                if answer is None:
                    self.send_error(404)
                    return
                status, headers, body = answer(self) if callable(answer) else answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def html(self, path, text, **headers):
        self.answers[path] = (200, {"Content-Type": "text/html"} | headers, page(f"<p>{text}</p>"))

    def asked_pages(self):
        return [path for path in self.asked if path not in ("/robots.txt", "/ai.txt")]


@pytest.fixture
def site():
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


def urls_source(folder, clock=None, **settings):
    settings = {"source": "urls", "allow_private": True, "retries": 1, "seconds": 5, "delay_seconds": 0} | settings
    source = open_source(SOURCES["urls"].parse(settings), folder, folder / "cache")
    source = replace(source, warc=replace(source.warc, extraction=Extraction(function=plain_text)))
    return replace(source, clock=(clock or Counted()).clock())


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False),
        ("2606:4700::1111", True),
    ],
)
def test_private_addresses_are_known_in_every_dress(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://e.org/",
        "http://",
        "http://u:p@e.org/",
        "javascript:1",
        "http://a b/",
        "//e.org",
        "http://[::1",
        "",
    ],
)
def test_an_address_that_is_not_plain_http_is_refused(url):
    with pytest.raises(FetchError) as refused:
        fetch_once(url, LOCAL)
    assert refused.value.kind == "bad_addresses"


def test_an_address_has_one_form():
    assert normal_url(" HTTP://Bücher.Example:80/a b?q=ü#part ") == "http://xn--bcher-kva.example:80/a%20b?q=%C3%BC"
    assert normal_url("http://e.org/a%20b") == "http://e.org/a%20b"


def test_a_private_address_is_refused_unless_allowed(site):
    site.html("/", "x")
    with pytest.raises(FetchError, match="inside a network"):
        fetch(site.url, replace(LOCAL, allow_private=False))
    assert site.asked == []
    assert fetch(site.url, LOCAL).status == 200


def test_a_redirect_to_a_private_address_is_refused(site, monkeypatch):
    """The first host is taken for a public one; the redirect leads to the same machine under its private address."""
    site.answers["/"] = (302, {"Location": f"{site.url}/secret"}, b"")
    site.html("/secret", "secret")
    monkeypatch.setattr("bessemer.data.sources.fetch.is_public", lambda address: address != "127.0.0.1" or not site.asked)
    with pytest.raises(FetchError) as refused:
        fetch(f"{site.url}/", replace(LOCAL, allow_private=False))
    assert refused.value.kind == "private_addresses"
    assert site.asked == ["/"]


def test_a_name_is_resolved_once_so_that_what_was_checked_is_connected_to(site, monkeypatch):
    """A name server that says a public address first and a private one afterwards."""
    said = []
    port = site.server.server_port

    def getaddrinfo(host, *_, **__):
        said.append(host)
        address = "127.0.0.1" if len(said) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    site.html("/", "x")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("bessemer.data.sources.fetch.is_public", lambda address: address == "127.0.0.1")
    assert fetch(f"http://rebinding.example:{port}/", replace(LOCAL, allow_private=False)).status == 200
    assert said.count("rebinding.example") == 1


def test_redirects_are_followed_and_counted(site):
    site.answers["/a"] = (301, {"Location": "b"}, b"")
    site.html("/b", "there")
    site.answers["/loop"] = (302, {"Location": "/loop"}, b"")
    assert fetch(f"{site.url}/a", LOCAL).url == f"{site.url}/b"
    with pytest.raises(FetchError) as refused:
        fetch(f"{site.url}/loop", LOCAL)
    assert refused.value.kind == "too_many_redirects"


def test_an_answer_that_is_too_long_is_cut_off_also_when_it_is_packed(site):
    site.answers["/long"] = (200, {}, b"x" * 200_000)
    site.answers["/bomb"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(bytes(50_000_000)))
    site.answers["/packed"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(b"fine"))
    for path in ("/long", "/bomb"):
        with pytest.raises(FetchError) as refused:
            fetch(site.url + path, LOCAL)
        assert refused.value.kind == "too_large"
    assert fetch(f"{site.url}/packed", LOCAL).body == b"fine"


def test_a_server_that_drips_is_given_up(site):
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)
        return 200, {}, b""

    def quiet(handler):
        try:
            return drip(handler)
        except OSError:
            return 200, {}, b""

    site.answers["/"] = quiet
    site.server.handle_error = lambda *_: None
    begun = time.monotonic()
    with pytest.raises(FetchError) as refused:
        fetch(site.url, replace(LOCAL, seconds=0.3, retries=0))
    assert refused.value.kind == "timed_out"
    assert time.monotonic() - begun < 3


def test_what_may_heal_is_tried_again_with_growing_waits_and_what_the_server_asks(site):
    left = [503, 429, 200]

    def answer(_):
        status = left.pop(0)
        return status, {"Retry-After": "7"} if status == 429 else {}, b"ok"

    site.answers["/"] = answer
    counted = Counted()
    assert fetch(site.url, LOCAL, clock=counted.clock()).body == b"ok"
    assert counted.waits == [1.0, 7.0]


def test_what_will_not_heal_is_not_tried_again(site):
    counted = Counted()
    with pytest.raises(FetchError) as refused:
        fetch(f"{site.url}/missing", LOCAL, clock=counted.clock())
    assert (refused.value.kind, counted.waits, len(site.asked)) == ("status_404", [], 1)


def test_pages_are_fetched_once_and_read_from_the_cache_ever_after(site, tmp_path):
    for number in range(3):
        site.html(f"/{number}", f"Page {number}")
    (tmp_path / "list.txt").write_text(f"# pages\n{site.url}/1\n{site.url}/2\nnot an address\n{site.url}/gone\n")
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
    site.html("/a", "x", **{"X-Robots-Tag": "noindex"})
    ((_, _, document),) = found(urls_source(tmp_path, urls=[f"{site.url}/a"]))
    assert document.metadata["opt_out"] == "noindex, ai.txt"


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
    with PageStore(tmp_path) as store:
        store.add_failure("http://a/", "timed_out", "slow")
        store.add_failure("http://b/", "status_503", "busy")
        store.add_failure("http://c/", "status_404", "gone")
    with PageStore(tmp_path) as store:
        assert set(store.outcomes) == {"http://c/"}


def test_a_page_closed_to_the_network_is_a_failure_and_no_crash(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    with pytest.raises(SourceError, match="no page could be fetched"):
        urls_source(tmp_path, urls=[url]).units()


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
    source = open_source(SOURCES["common_crawl"].parse(settings), folder, folder / "cache")
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
