from __future__ import annotations

import pytest

from bessemer.core.errors import SourceError
from bessemer.data.sources import html as pages
from bessemer.data.sources.html import Extraction, opt_out, page_document
from bessemer.data.sources.markup import text_of_markup
from bessemer.data.sources.source import Tally, license_of_address, license_of_text, stated_license
from tests.data.sources.makers import documents, page, plain_text


def document_of(content, **options):
    return page_document(content, "a", "a", Extraction(function=plain_text), Tally(), **options)


@pytest.mark.parametrize(
    ("content", "charset"),
    [
        ("Grüße".encode(), None),
        ("Grüße".encode("cp1252"), "iso-8859-1"),
        (b'<meta charset="iso-8859-15">Gr\xfc\xdfe', None),
        ("Grüße".encode("utf-16"), None),
    ],
)
def test_a_page_is_decoded_by_its_mark_its_servers_word_or_its_own(content, charset):
    assert document_of(content, charset=charset).text == "Grüße"


def test_a_page_that_cannot_be_decoded_whole_is_counted():
    tally = Tally()
    page_document("Grüße aus dem Werk ".encode() * 50 + b"\xff", "a", "a", Extraction(function=plain_text), tally)
    assert tally.counts == {"undecodable_pages": 1}


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ('<meta name="robots" content="noindex, nofollow, noarchive">', None),
        ('<meta name="robots" content="none">', None),
        ('<meta name="googlebot" content="noarchive, noai, noimageai">', "noai, noimageai"),
        ("<META CONTENT='NOAI' NAME='Robots'>", "noai"),
        ('<meta name="tdm-reservation" content="1">', "tdm-reservation"),
        ('<meta name="tdm-reservation" content="0">', None),
        ('<meta name="description" content="noai">', None),
        ('<meta name="GPTBot" content="noml"><meta name=robots content=none>', "noml"),
        ('<meta name="CCBot" content="noindex, noarchive">', "ccbot: noindex"),
        ('<meta name="anthropic-ai" content="none">', "anthropic-ai: none"),
        ("", None),
    ],
)
def test_what_a_page_says_against_use_is_found(head, expected):
    assert opt_out(head) == expected
    document = document_of(page("<p>x</p>", head))
    assert document.metadata.get("opt_out") == expected


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ('<a rel="license" href="https://creativecommons.org/licenses/by-sa/4.0/">CC</a>', "CC-BY-SA-4.0"),
        ('<link href="http://creativecommons.org/publicdomain/zero/1.0/" rel=license>', "CC0-1.0"),
        ("<a href='//creativecommons.org/licenses/by/3.0/de/' rel='nofollow license'>", "CC-BY-3.0"),
        ('<a href="https://creativecommons.org/licenses/by/4.0/">about licences</a>', None),
        ('<a rel="license" href="/terms">ours</a>', "fallback"),
    ],
)
def test_the_licence_is_the_one_that_the_page_links_as_its_own(link, expected):
    document = document_of(page(f"<p>x</p>{link}"), license="fallback")
    assert document.license == (expected or "fallback")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://creativecommons.org/licenses/by-nc-nd/3.0/us/", "CC-BY-NC-ND-3.0"),
        ("https://www.gnu.org/licenses/agpl-3.0.html", "AGPL-3.0"),
        ("https://www.gnu.org/licenses/old-licenses/gpl-2.0.html", "GPL-2.0"),
        ("https://opensource.org/license/mit", "MIT"),
        ("https://www.apache.org/licenses/LICENSE-2.0", "Apache-2.0"),
        ("https://example.org/", None),
    ],
)
def test_an_address_tells_its_licence(address, expected):
    assert license_of_address(address) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"# SPDX-License-Identifier: MIT\n", "MIT"),
        (b"/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */", "GPL-2.0-only WITH Linux-syscall-note"),
        (b"// SPDX-License-Identifier: (MIT OR Apache-2.0)", "(MIT OR Apache-2.0)"),
        (b"# no licence", None),
    ],
)
def test_an_spdx_line_is_read_to_its_end(line, expected):
    assert stated_license(line) == expected


def test_a_text_that_no_licence_is_has_none():
    assert license_of_text("All rights reserved.") is None


def test_a_page_without_main_text_is_counted():
    tally = Tally()
    assert page_document(b"<p></p>", "a", "a", Extraction(function=lambda page, url: " "), tally) is None
    assert tally.counts == {"pages_without_text": 1}


def test_an_extractor_that_fails_costs_one_page():
    def fails(page, url):
        raise RecursionError("too deep")

    tally = Tally()
    assert page_document(b"<p>x</p>", "a", "a.html", Extraction(function=fails), tally) is None
    assert tally.counts["extraction_failures"] == 1
    assert tally.notes == ["a.html: RecursionError: too deep"]


def test_a_page_on_which_trafilatura_runs_out_of_time_is_named_and_a_union_keeps_our_text(monkeypatch):
    from bessemer.data.extraction import extract as peers
    from bessemer.data.sources import html as pages

    def late(html, url=None):
        raise peers.NoAnswerError("extraction_timeouts", "trafilatura took more than 10 s for this page")

    pages._working_extractor.cache_clear()
    monkeypatch.setattr(peers, "shared_trafilatura", lambda: lambda html, url=None: "")
    tally, sentence = Tally(), "The furnace of the steel works has to be heated with great care. " * 5
    content = f"<article><p>{sentence}</p></article>".encode()
    assert page_document(content, "a", "a.html", Extraction("union"), tally) is not None
    assert not tally.counts
    monkeypatch.setattr(peers, "shared_trafilatura", lambda: late)
    assert sentence.strip() in page_document(content, "a", "a.html", Extraction("union"), tally).text
    assert page_document(content, "b", "b.html", Extraction("union"), tally) is not None
    assert tally.counts == {"extraction_timeouts": 2}
    assert tally.notes[1] == "b.html: trafilatura took more than 10 s for this page"
    pages._working_extractor.cache_clear()


def test_an_extractor_that_fails_on_any_page_ends_the_run(monkeypatch):
    """Else a whole crawl would be set aside page by page."""
    import bessemer.data.extraction.extract as extraction
    from bessemer.data.sources import html as pages

    def broken(html, *, url=None, extractor="bessemer", on_failure=None):
        raise KeyError("inputs")

    pages._working_extractor.cache_clear()
    monkeypatch.setattr(extraction, "extract", broken)
    with pytest.raises(SourceError, match="extractor 'bessemer' does not work here: KeyError: 'inputs'"):
        page_document(b"<p>x</p>", "a", "a", Extraction(), Tally())
    pages._working_extractor.cache_clear()


def test_the_built_in_extractor_is_the_default():
    text = "Steel is an alloy of iron and carbon, and it has been made for thousands of years in many places. " * 5
    document = page_document(page(f"<article><h1>Steel</h1><p>{text}</p></article>"), "a", "a", Extraction(), Tally())
    assert "thousands of years" in document.text


def test_a_tree_of_pages_is_named_by_its_paths_and_gets_addresses_from_the_settings(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.html").write_bytes(page("<p>x</p>"))
    (tmp_path / "a" / "note.txt").write_bytes(b"not read")
    (document,) = documents("html", tmp_path, base_url="https://e.org/", license="MIT")
    assert (document.locator, document.url, document.group) == ("a/b/x.html", "https://e.org/a/b/x.html", "e.org")
    assert (document.license, document.metadata["html_language"]) == ("MIT", "en")


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("<h2>A</h2><p>b <b>c</b>\n d</p>e", "## A\n\nb c d\n\ne"),
        ("<ul><li>a<li>b<ol><li>c</ol></ul>", "- a\n- b\n  1. c"),
        ("<pre>x\n  y</pre>", "```\nx\n  y\n```"),
        ("<table><tr><td>1<td>2</tr><tr><td>3<td>4</table>", "1 | 2\n3 | 4"),
        ("<blockquote><p>a<p>b</blockquote>", "> a\n\n> b"),
        ("a<script>b</script>c<br>d", "ac\nd"),
        ("&lt;a&gt; &amp; ü", "<a> & ü"),
        ("", ""),
    ],
)
def test_markup_becomes_text_with_its_structure(markup, expected):
    assert text_of_markup(markup) == expected


@pytest.mark.parametrize("markup", ["<div>" * 200_000, "<b>" * 100_000 + "x", "<ul><li>" * 50_000, "<table><tr><td>" * 20_000])
def test_nesting_without_end_is_no_danger(markup):
    text_of_markup(markup + "x")


def test_more_elements_than_any_page_has_are_refused():
    with pytest.raises(ValueError, match="more than 300,000 elements"):
        text_of_markup("<br>" * 300_001)


def test_a_tags_attributes_are_found_in_linear_time():
    """A million letters took hours when each was tried as a beginning, and each way to end there."""
    letters = "a" * 1_000_000
    assert pages._ATTRIBUTE.findall(letters) == []
    assert pages._ATTRIBUTE.findall(f"{letters} {letters}{' ' * 1000}") == []
    assert [name for name, *_ in pages._ATTRIBUTE.findall(f"<a {letters} href = 'x' rel=license title=\"y\">")] == [
        *("href", "rel", "title")
    ]


def test_a_tag_is_read_once_however_often_it_names_a_licences_host(monkeypatch):
    read = []

    class Counting:
        def findall(self, tag):
            read.append(tag)
            return []

    monkeypatch.setattr(pages, "_ATTRIBUTE", Counting())
    hosts = "https://creativecommons.org/licenses/by/4.0/ " * 40
    pages.license_link(f'<a title="{hosts}">x</a> <a href="https://creativecommons.org/licenses/by/4.0/">'.encode())
    assert len(read) == 2
