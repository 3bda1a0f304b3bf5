from __future__ import annotations

import gzip
from dataclasses import replace

import pytest

from bessemer.data.sources.source import Tally
from tests.data.sources.makers import assert_resumes, documents, found, opened, page, warc

PAGES = [(f"http://e.org/{n}", page(f"<p>Page {n} about steel. {'More of it. ' * 20}</p>")) for n in range(8)]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_each_page_is_a_document_with_its_address_and_record(tmp_path, compression):
    (tmp_path / f"a.warc{compression}").write_bytes(warc(PAGES, compression))
    read = documents("warc", tmp_path)
    assert [document.url for document in read] == [url for url, _ in PAGES]
    assert read[3].text.startswith("Page 3 about steel.")
    assert read[3].locator == "<urn:uuid:00000000-0000-4000-8000-000000030004>"
    assert read[3].group == "e.org"
    assert (read[3].metadata["title"], read[3].metadata["date"]) == ("A page", "2026-01-02T03:04:05Z")


def test_the_documents_do_not_depend_on_how_the_archive_is_compressed(tmp_path):
    read = []
    for number, (compression, members) in enumerate(
        [("", True), (".gz", True), (".gz", False), (".zst", True), (".zst", False)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"a.warc{compression}").write_bytes(warc(PAGES, compression, members=members))
        read.append([replace(document, metadata={}) for _, _, document in assert_resumes(opened("warc", folder))])
    assert all(other == read[0] for other in read)


def test_a_position_is_reached_by_a_seek_without_reading_what_stands_before(tmp_path):
    content = warc(PAGES)
    (tmp_path / "a.warc.gz").write_bytes(content)
    source = opened("warc", tmp_path)
    everything = found(source)
    unit, position, _ = everything[5]
    (tmp_path / "a.warc.gz").write_bytes(b"\0" * (len(content) * 5 // 8) + content[len(content) * 5 // 8 :])
    assert list(source.read(unit, position, Tally())) == [(p, d) for _, p, d in everything[6:]]


def test_text_of_a_wet_file_is_taken_as_it_is(tmp_path):
    text = "Grüße aus der Hütte.\nZweite Zeile."
    record = (
        f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://e.org/\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        f"WARC-Identified-Content-Language: deu\r\nContent-Type: text/plain\r\n"
        f"Content-Length: {len(text.encode())}\r\n\r\n{text}\r\n\r\n"
    )
    (tmp_path / "a.warc.wet.gz").write_bytes(gzip.compress(record.encode()))
    (document,) = documents("warc", tmp_path)
    assert (document.text, document.url, document.metadata["identified_language"]) == (text, "http://e.org/", "deu")


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("where", [0, 3, 7])
def test_a_damaged_record_costs_only_itself(tmp_path, compression, where):
    """Every record is a member; one byte of one page's member is turned."""
    members = [warc([pair], compression) for pair in PAGES]
    hurt = bytearray(members[where])
    hurt[len(hurt) // 2] ^= 0xFF
    members[where] = bytes(hurt)
    (tmp_path / f"a.warc{compression}").write_bytes(b"".join(members))
    tally = Tally()
    read = documents("warc", tmp_path, tally)
    assert {url for url, _ in PAGES} - {document.url for document in read} == {f"http://e.org/{where}"}
    assert tally.counts.total() >= 1
    assert tally.notes[0].startswith(f"a.warc{compression}: ")


def test_a_length_that_lies_costs_the_records_it_covers_and_no_more(tmp_path):
    content = warc(PAGES, "")
    at = content.index(b"Content-Length", content.index(b"http://e.org/2") - 400)
    for changed in (b"Content-Length: 9999999999\r\n", b"Content-Length: 1\r\n", b"Content-Length: x\r\n"):
        end = content.index(b"\r\n", at) + 2
        (tmp_path / "a.warc").write_bytes(content[:at] + changed + content[end:])
        tally = Tally()
        read = {document.url for document in documents("warc", tmp_path, tally)}
        assert {f"http://e.org/{n}" for n in (0, 1, 4, 5, 6, 7)} <= read
        assert tally.counts["damaged_records"] >= 1


def test_a_page_over_the_limit_is_set_aside(tmp_path):
    pages = [PAGES[0], ("http://e.org/long", page("<p>" + "x" * 300_000 + "</p>")), PAGES[1]]
    (tmp_path / "a.warc.gz").write_bytes(warc(pages))
    tally = Tally()
    read = documents("warc", tmp_path, tally, max_document_bytes=100_000)
    assert [document.url for document in read] == ["http://e.org/0", "http://e.org/1"]
    assert tally.counts == {"too_large": 1}


def test_a_body_that_was_sent_compressed_or_in_chunks_is_read(tmp_path):
    body = gzip.compress(PAGES[0][1])
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    headers = ["Content-Encoding: gzip", "Transfer-Encoding: chunked"]
    (tmp_path / "a.warc.gz").write_bytes(warc([("http://e.org/0", chunked)], headers=headers))
    (document,) = documents("warc", tmp_path)
    assert document.text.startswith("Page 0 about steel.")


def test_a_body_that_expands_to_a_gigabyte_is_set_aside(tmp_path):
    bomb = gzip.compress(bytes(200_000_000))
    (tmp_path / "a.warc.gz").write_bytes(warc([("http://e.org/0", bomb), PAGES[1]], headers=["Content-Encoding: gzip"]))
    tally = Tally()
    documents("warc", tmp_path, tally, max_document_bytes=1_000_000)
    assert tally.counts["too_large"] == 1


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("X-Robots-Tag: noai, noimageai", "noai, noimageai"),
        ("TDM-Reservation: 1", "tdm-reservation"),
        ("X-Robots-Tag: all", None),
        ("X-Robots-Tag: noindex, noarchive", None),
        ("X-Robots-Tag: googlebot: noindex", None),
        ("X-Robots-Tag: GPTBot: noindex, nofollow", "gptbot: noindex"),
        ("X-Robots-Tag: noai, googlebot: noindex", "noai"),
        ("X-Robots-Tag: unavailable_after: 25 Jun 2030 15:00:00 PST, noai", "noai"),
    ],
)
def test_what_the_server_said_against_use_is_kept(tmp_path, header, expected):
    (tmp_path / "a.warc.gz").write_bytes(warc(PAGES[:1], headers=[header]))
    (document,) = documents("warc", tmp_path)
    assert document.metadata.get("opt_out") == expected


def test_answers_that_are_no_pages_are_counted(tmp_path):
    (tmp_path / "a.warc").write_bytes(
        warc(PAGES[:2], "")
        .replace(b"200 OK", b"404 NO", 1)
        .replace(b"text/html; charset=utf-8", b"application/x-steelwork;", 2)
    )
    tally = Tally()
    assert documents("warc", tmp_path, tally) == []
    assert tally.counts["records_that_are_not_pages"] == 2
