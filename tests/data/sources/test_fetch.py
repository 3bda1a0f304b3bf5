from __future__ import annotations

import gzip
import socket
import time
from dataclasses import replace

import pytest

from bessemer.data.sources.io.fetch import FetchError, Limits, fetch, fetch_once, is_public, normal_url
from tests.data.sources.web import Counted

LOCAL = Limits("testbot/1", seconds=5, max_bytes=100_000, retries=2, allow_private=True)


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
    monkeypatch.setattr("bessemer.data.sources.io.fetch.is_public", lambda address: address != "127.0.0.1" or not site.asked)
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
    monkeypatch.setattr("bessemer.data.sources.io.fetch.is_public", lambda address: address == "127.0.0.1")
    assert fetch(f"http://rebinding.example:{port}/", replace(LOCAL, allow_private=False)).status == 200
    assert said.count("rebinding.example") == 1


@pytest.mark.parametrize(("address", "host"), [("https://example.org", "example.org"), ("https://example.org:8443", None)])
def test_a_request_names_no_port_but_another_than_its_schemes(address, host, site, monkeypatch):
    """The server is that of the test, and the certificate nobody's."""

    class Unencrypted:
        def wrap_socket(self, raw, server_hostname):
            return raw

    said = []
    site.answers["/"] = lambda handler: (200, {}, handler.headers["Host"].encode())
    place = (socket.AF_INET, ("127.0.0.1", site.server.server_port))
    monkeypatch.setattr("bessemer.data.sources.io.fetch._resolved", lambda host, port, allowed: said.append(port) or [place])
    monkeypatch.setattr("ssl.create_default_context", Unencrypted)
    assert fetch(address, LOCAL).body.decode() == (host or "example.org:8443")
    assert said == [8443 if host is None else 443]


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
    with pytest.raises(FetchError) as refused:  # no single read takes 0.3 s, all of them 5
        fetch(site.url, replace(LOCAL, seconds=0.3, retries=0))
    assert refused.value.kind == "timed_out"


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
