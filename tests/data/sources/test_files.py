from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import os
import time
from contextlib import contextmanager

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import SourceError
from bessemer.core.progress import Silent
from bessemer.data.sources.files import TextFiles
from bessemer.data.sources.io import paths
from bessemer.data.sources.io.file_source import bounded_lines, record_document
from bessemer.data.sources.io.paths import READ_BY, ContentFingerprints
from bessemer.data.sources.io.streams import open_stream
from bessemer.data.sources.registry import source_fingerprint, source_plugin
from bessemer.data.sources.source import Tally
from tests.data.sources.makers import files_source, opened

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def find_files(paths, folder):
    return [name for unit in files_source(paths, folder, 1).units() for name, _ in unit.files]


def read(folder, *paths, max_bytes=100_000, tally=None):
    source = files_source([str(path) for path in paths], folder, max_bytes)
    tally = tally if tally is not None else Tally()
    return [document for unit in source.units() for _, document in source.read(unit, 0, tally)]


def test_a_text_file_is_one_document_named_by_its_path_and_offset(tmp_path):
    (tmp_path / "books" / "old").mkdir(parents=True)
    (tmp_path / "books" / "old" / "a.txt").write_text("One.\n\nTwo.\n", encoding="utf-8")
    (document,) = read(tmp_path, "books")
    assert (document.locator, document.text) == ("old/a.txt#0", "One.\n\nTwo.")


def test_a_long_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"paragraph {n}\n\n" for n in range(10)), encoding="utf-8")
    documents = read(tmp_path, "a.txt", max_bytes=30)
    assert [document.locator for document in documents] == ["a.txt#0", "a.txt#26", "a.txt#52", "a.txt#78", "a.txt#104"]
    assert "\n\n".join(document.text for document in documents) + "\n\n" == (tmp_path / "a.txt").read_text(encoding="utf-8")


def test_a_paragraph_longer_than_the_limit_stays_whole(tmp_path):
    (tmp_path / "a.txt").write_text("short\n\n" + "long " * 20 + "\n\nshort\n", encoding="utf-8")
    assert [len(document.text) for document in read(tmp_path, "a.txt", max_bytes=20)] == [5, 100, 5]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["", "a", "bb ccc", "é€😀", "  "]), max_size=20), st.integers(1, 40))
def test_cutting_loses_only_white_space_between_documents(tmp_path_factory, lines, max_bytes):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "a.txt").write_bytes("\n".join(lines).encode())
    documents = read(folder, "a.txt", max_bytes=max_bytes)
    assert "".join("".join(d.text for d in documents).split()) == "".join("".join(lines).split())
    raw = (folder / "a.txt").read_bytes()
    for document in documents:
        start = int(document.metadata["offset"])
        assert raw[start:].decode().lstrip("\n").startswith(document.text)


def test_documents_of_one_file_share_a_group(tmp_path):
    (tmp_path / "a.txt").write_text("x\n\n" * 10, encoding="utf-8")
    assert {document.group for document in read(tmp_path, "a.txt", max_bytes=4)} == {"a.txt"}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_compression_does_not_show_in_the_documents(tmp_path, suffix):
    content = "Grüße\n\n".encode() * 50
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix](content))
    assert [(d.locator, d.text) for d in read(tmp_path, f"a.txt{suffix}")] == [("a.txt#0", content.decode().strip())]


def test_several_members_or_frames_are_read_to_the_end(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"one\n") + zstandard.compress(b"two\n"))
    assert [document.text for document in read(tmp_path, ".")] == ["one\ntwo", "one\ntwo"]


def test_bytes_that_are_not_utf8_are_replaced_counted_and_reported(tmp_path):
    (tmp_path / "a.txt").write_bytes("Grüße, Öl\n".encode() + b"caf\xe9 and \xff\xfe\nfine \xef\xbf\xbd\n")
    tally = Tally()
    (document,) = read(tmp_path, "a.txt", tally=tally)
    assert document.text == "Grüße, Öl\ncaf\ufffd and \ufffd\ufffd\nfine \ufffd"
    assert tally.counts["undecodable_bytes"] == 3
    assert tally.counts["files_with_undecodable_bytes"] == 1
    assert tally.notes == ["a.txt: 3 bytes are not UTF-8 and were replaced"]


SENTENCE = "Die Größe des Flözes überraschte Müller außerordentlich; »Glück auf«, rief er.\n\n"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_text_in_another_encoding_is_read_with_a_note_and_cut_and_resumed_as_in_utf8(tmp_path, encoding, suffix):
    found, tally = {}, Tally()
    for name in ("utf-8", encoding):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"a.TXT{suffix}").write_bytes(COMPRESS[suffix]((SENTENCE * 9).encode(name)))
        source = files_source(["."], folder, 200)
        (unit,) = source.units()
        found[name] = list(source.read(unit, 0, tally))
        for number, (position, _) in enumerate(found[name], start=1):
            assert list(source.read(unit, position, Tally())) == found[name][number:]
    assert found[encoding] == found["utf-8"] and len(found["utf-8"]) > 3
    assert (tally.counts, tally.notes) == ({"files_in_other_encodings": 1}, [f"a.TXT{suffix}: read as {encoding}"])
    assert tally.losses == []


def test_records_in_another_encoding_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": SENTENCE}, ensure_ascii=False).encode("cp1252"))
    assert [document.text for document in read(tmp_path, ".")] == [SENTENCE]


def test_a_record_with_its_text_under_another_name_is_told_how_to_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "Steel", "body": "Steel is iron.", "stars": 3}\n', encoding="utf-8")
    tally = Tally()
    assert read(tmp_path, ".", tally=tally) == []
    assert tally.losses == tally.notes
    assert tally.notes[0].endswith(
        "; it has 'title', 'body', 'stars', and {source: tables, columns: {text: body}} reads 'body'"
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.csv", "; {source: tables} reads .csv"),
        ("a.parquet", "; {source: tables} reads .parquet"),
        ("a.pdf", "; {source: pdf} reads .pdf"),
        ("a.htm", "; {source: html} reads .htm"),
        ("a.warc.gz", "; {source: warc} reads .warc"),
        ("a.docx", "; to convert .docx: pandoc FILE -t plain --wrap none -o FILE.txt"),
        ("a.json", "; to convert .json: jq -c '.[]' FILE > FILE.jsonl, where it is a list of objects"),
        ("a.png", ")"),
    ],
)
def test_a_file_of_another_kind_names_what_reads_it(tmp_path, name, advice):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(b"x")
    with pytest.raises(SourceError) as error:
        find_files([f"in/{name}"], tmp_path)
    assert str(error.value).endswith(advice)
    with pytest.raises(SourceError) as error:
        find_files(["in"], tmp_path)
    assert str(error.value).endswith(advice)


def test_a_source_that_is_named_for_a_suffix_reads_it(tmp_path):
    assert [suffix for suffix, kind in READ_BY.items() if not opened(kind, tmp_path).format.reads(f"a{suffix}")] == []


def test_a_byte_order_mark_and_carriage_returns_are_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read(tmp_path, "a.txt")[0].text == "one\ntwo"


NUMBERED_LINES = b"".join(b"line %d\n\n" % n for n in range(20000))


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        # mtime: gzip writes the current second into its header unless it is given one
        ("cut.txt.gz", gzip.compress(NUMBERED_LINES, mtime=0)[:-900], 15000),
        ("cut.txt.zst", zstandard.compress(NUMBERED_LINES)[:-9], 10000),
        ("wrong.txt.gz", b"not gzip", 0),
        ("wrong.jsonl.zst", b"not zstd", 0),
        ("flipped.txt.gz", gzip.compress(b"line\n\n" * 1000, mtime=0)[:-8] + b"\0" * 8, 0),
    ],
)
def test_a_damaged_file_is_named_and_what_stood_before_the_damage_is_kept(tmp_path, name, content, lines):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.txt").write_text("whole", encoding="utf-8")
    tally = Tally()
    *found, last = read(tmp_path, ".", tally=tally)
    assert last.text == "whole"
    assert sum(document.text.count("line") for document in found) >= lines
    assert tally.counts["damaged_files"] == 1
    assert tally.notes[0].startswith(f"{name}: ")
    assert "\n" not in tally.notes[0]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["missing.txt"], "no such file or folder"),
        (["empty"], "holds no file that the source reads"),
        (["*.md"], "holds no file that the source reads"),
        (["table.csv"], "not a kind of file that the source reads"),
    ],
)
def test_a_path_that_gives_nothing_is_named(tmp_path, paths, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n", encoding="utf-8")
    with pytest.raises(SourceError, match=message):
        find_files(paths, tmp_path)


def test_the_root_does_not_depend_on_what_a_pattern_matches(tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_text("x", encoding="utf-8")
    assert find_files(["texts/**/*.txt"], tmp_path) == ["deep/a.txt"]
    assert find_files(["texts", "texts/deep"], tmp_path) == ["deep/a.txt"]
    (tmp_path / "texts" / "b.txt").write_text("x", encoding="utf-8")
    assert find_files(["texts/**/*.txt"], tmp_path) == ["b.txt", "deep/a.txt"]


def test_two_folders_with_files_of_one_name_keep_them_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name, encoding="utf-8")
    assert [document.locator for document in read(tmp_path, "one", "two")] == ["one/a.txt#0", "two/a.txt#0"]


def test_a_record_is_named_by_its_id_or_its_text():
    named = record_document({"id": 7, "text": "x"}, "f")
    assert named.locator.startswith("id:7:") and named.group == "id:7"
    assert named.locator == record_document({"id": "7", "text": "x"}, "g").locator
    others = [{"id": 7, "text": "y"}, {"id": 8, "text": "x"}, {"text": "x"}]
    assert named.locator not in {record_document(other, "f").locator for other in others}
    assert record_document({"text": "x"}, "f").locator == record_document({"text": "x", "url": "u"}, "g").locator
    assert record_document({"text": "x"}, "f").locator != record_document({"text": "y"}, "f").locator


def test_a_record_keeps_its_plain_fields_as_metadata():
    document = record_document(
        {"text": "x", "url": "u", "license": "MIT", "package": "p", "stars": 3, "list": [1], "metadata": {"a": "b"}}, "f"
    )
    assert (document.url, document.license, document.group) == ("u", "MIT", "p")
    assert document.metadata == {"package": "p", "stars": "3", "a": "b"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{bad", "is not JSON"),
        ("[1]", "needs to be a JSON object, got list"),
        ('{"txt": "a"}', "needs a 'text'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"text": null}', "needs a 'text'"),
    ],
)
def test_a_line_that_is_not_a_record_is_named_and_set_aside(tmp_path, line, why):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "fine"}) + "\n\n" + line + "\n" + json.dumps({"text": "too"}) + "\n", encoding="utf-8"
    )
    tally = Tally()
    assert [document.text for document in read(tmp_path, "a.jsonl", tally=tally)] == ["fine", "too"]
    assert tally.counts["bad_records"] == 1
    assert tally.notes[0].startswith("a.jsonl: byte 18: ")
    assert why in tally.notes[0]


def test_nul_characters_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\0two\0\n")
    tally = Tally()
    assert [document.text for document in read(tmp_path, "a.txt", tally=tally)] == ["onetwo"]
    assert tally.counts["nul_characters"] == 2


def test_an_empty_file_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b"")
    tally = Tally()
    assert read(tmp_path, ".", tally=tally) == []
    assert tally.counts == {"empty_files": 2}


def test_a_paragraph_beyond_all_measure_is_cut_between_characters(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 100 + "\n\nend\n", encoding="utf-8")
    reader = files_source(["a.txt"], tmp_path, 10)
    reader = dataclasses.replace(reader, format=TextFiles(reader.format.settings, longest_paragraph=31))
    tally = Tally()
    documents = [document for unit in reader.units() for _, document in reader.read(unit, 0, tally)]
    assert "".join(document.text for document in documents) == "é" * 100 + "end"
    assert max(len(document.text.encode()) for document in documents) == 32
    assert tally.counts["cut_paragraphs"] == 6
    assert tally.counts["undecodable_bytes"] == 0


def test_a_record_too_long_to_hold_is_read_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "' + "x" * 500 + '"}\n{"text": "two"}\n', encoding="utf-8")
    with open_stream(tmp_path / "a.jsonl") as stream:
        assert [line and line[10:13] for _, _, line in bounded_lines(stream, 100)] == [b"one", None, b"two"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_reading_goes_on_from_any_position(tmp_path, name, suffix):
    lines = [f"paragraph {n} é\n\n" if name == "a.txt" else json.dumps({"id": n, "text": f"x{n}"}) + "\n" for n in range(40)]
    (tmp_path / (name + suffix)).write_bytes(COMPRESS[suffix]("".join(lines).encode()))
    source = files_source(["."], tmp_path, 50)
    (unit,) = source.units()
    whole = list(source.read(unit, 0, Tally()))
    assert len(whole) > 10
    for number, (position, _) in enumerate(whole, start=1):
        assert list(source.read(unit, position, Tally())) == whole[number:]


def test_the_fingerprint_follows_content_and_the_names_that_ids_are_made_from(tmp_path):
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    before = files_source(["."], tmp_path, 1).fingerprint()
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    renamed = files_source(["."], tmp_path, 1).fingerprint()
    (tmp_path / "b.txt").write_text("y", encoding="utf-8")
    assert len({json.dumps(value) for value in (before, renamed, files_source(["."], tmp_path, 1).fingerprint())}) == 3


def test_a_change_anywhere_in_a_large_file_changes_its_fingerprint(tmp_path):
    size, changed = 260 << 20, 1 << 20
    with (tmp_path / "a.txt").open("wb") as stream:
        stream.truncate(size)
    before = files_source(["."], tmp_path, 1).fingerprint()
    with (tmp_path / "a.txt").open("r+b") as stream:
        # 64 samples spread evenly over the file would miss it
        stream.seek(size // 63 // 4)
        stream.write(b"x" * changed)
    assert files_source(["."], tmp_path, 1).fingerprint() != before


class Reads(Silent):
    """Counts the bytes of the files that are read."""

    def __init__(self):
        self.bytes = 0

    @contextmanager
    def task(self, description, total=None, unit="", completed=0):
        yield self

    def advance(self, amount=1, note=None):
        self.bytes += amount


@pytest.fixture
def remembered(tmp_path, monkeypatch):
    """Fingerprints of what is in `in`, asked a minute after the last write: (fingerprint, bytes that were read for it)."""
    monkeypatch.setattr(paths, "_REMEMBERED_BYTES", 8)
    monkeypatch.setattr(paths, "_LONG_READ_BYTES", 0)
    (tmp_path / "in").mkdir()

    def ask(seconds_later=60):
        reads = Reads()
        fingerprints = ContentFingerprints(tmp_path / "cache", reads, lambda: time.time_ns() + seconds_later * 10**9)
        return files_source(["in"], tmp_path, 1).fingerprint(fingerprints), reads.bytes

    return ask


def test_a_large_file_is_read_once_and_again_when_it_has_changed(tmp_path, remembered):
    file = tmp_path / "in" / "a.txt"
    file.write_bytes(b"0123456789")
    (tmp_path / "in" / "small.txt").write_bytes(b"abc")
    before, read = remembered()
    assert read == 13
    assert remembered() == (before, 3)
    status = file.stat()
    # as large, in place, and with the time of its last write set back
    file.write_bytes(b"0123456788")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after, read = remembered()
    assert (after != before, read) == (True, 13)
    assert after == files_source(["in"], tmp_path, 1).fingerprint()


def test_a_file_that_has_just_been_written_is_read_again(tmp_path, remembered):
    (tmp_path / "in" / "a.txt").write_bytes(b"0123456789")
    assert remembered(seconds_later=0) == remembered(seconds_later=0)
    assert remembered(seconds_later=0)[1] == 10


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": 1, "hash": "x"}'])
def test_a_damaged_memory_of_fingerprints_is_passed_over(tmp_path, remembered, content):
    (tmp_path / "in" / "a.txt").write_bytes(b"0123456789")
    before = remembered()
    for entry in (tmp_path / "cache" / "fingerprints").iterdir():
        entry.write_text(content, encoding="utf-8")
    assert remembered() == before


def test_what_is_remembered_of_fingerprints_lies_in_the_cache_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_SETTLED_NANOSECONDS", -(10**9))
    (tmp_path / "a.txt").write_bytes(b"x" * (2 << 20))
    settings = source_plugin("files").settings.parse({"paths": "a.txt"})
    cache = tmp_path / "cache"
    first = source_fingerprint(settings, cache=cache, folder=tmp_path)
    assert len(list((cache / "fingerprints").iterdir())) == 1
    assert source_fingerprint(settings, cache=cache, folder=tmp_path) == first
