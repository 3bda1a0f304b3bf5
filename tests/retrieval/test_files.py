"""Folders of office files: what cannot be read is one line each and the rest goes on; places in the index; a watched folder."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import pytest

from bessemer.core.errors import ArtefactError
from bessemer.data.sources.source import Tally
from bessemer.retrieval import documents, store
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import build_index, open_index
from bessemer.retrieval.reading import files
from bessemer.retrieval.search import search
from tests.retrieval.pdfs import pdf, rule, text
from tests.retrieval.test_commands import run

pytest.importorskip("lancedb")

WORDS_ONLY = IndexConfig(embedder="none")


def zipped(members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in members.items():
            package.writestr(name, content)
    return data.getvalue()


def read(folder, cache, tally=None):
    return list(documents.documents_of(documents.sources_of(str(folder)), cache, tally or Tally()))


def test_bad_files_are_one_line_each_and_the_others_are_indexed_with_their_pages(tmp_path, capsys, monkeypatch):
    for library in ("docx", "pptx"):
        pytest.importorskip(library)
    monkeypatch.setattr(files, "_FREE_BYTES", 1 << 20)
    docs = tmp_path / "docs"
    docs.mkdir()
    bad = {
        "empty.pdf": (b"", "it is empty"),
        "junk.pdf": (bytes(range(256)) * 9, "Failed to load document"),
        "locked.pdf": (pdf([text(72, 700, "secret")], is_encrypted=True), "it needs a password"),
        "scan.pdf": (pdf([rule(72, 700, 90, 700)]), "no text is in it; scanned?"),
        "cut.docx": (zipped({"word/document.xml": "x" * 5000})[:-30], "it is damaged"),
        "locked.docx": (files._OLE + b"\0" * 99 + files._ENCRYPTED_STREAM, "it needs a password"),
        "old.xlsx": (files._OLE + b"\0" * 999, "it is in an older format"),
        "bomb.xlsx": (zipped({"xl/workbook.xml": bytes(3 << 20)}), "it expands from"),
        "photos.pptx": (zipped({"a.png": b"x"}), "it is a zip archive and no office file"),
        "empty.xlsx": (zipped({"xl/workbook.xml": "<a/>"}), "it is not an Excel workbook, or damaged"),
    }
    for name, (data, _) in bad.items():
        (docs / name).write_bytes(data)
    for name in ("program.txt#0", "noise.md#0"):
        bad[name] = (b"", "it is binary, whatever its name says")
    (docs / "noise.md").write_bytes(bytes(one * 7 % 256 for one in range(999)))
    (docs / "program.txt").write_bytes(Path(sys.executable).read_bytes()[:9000])
    bad["huge.pdf"] = (b"", "over 134,217,728 bytes")
    with (docs / "huge.pdf").open("wb") as huge:
        huge.truncate((128 << 20) + 1)
    (docs / "~$notes.docx").write_bytes(b"x")
    (docs / "photo.png").write_bytes(b"\x89PNG")
    (docs / "letter.odt").write_bytes(b"PK")
    (docs / "b.md").write_text("Copper turns green.\n", encoding="utf-8")
    (docs / "a.pdf").write_bytes(pdf([text(72, 700, "Tin.")], [text(72, 700, "Iron rusts in water."), text(72, 600, "Lead.")]))
    code, printed, _ = run(capsys, "index", str(docs), str(tmp_path / "i"), "--embedder", "none")
    assert code == 0 and "2 documents" in printed
    lines = {line.split(": ")[1]: line for line in printed.splitlines() if line.startswith("  left out: ")}
    assert lines.keys() == bad.keys()
    assert [name for name, (_, reason) in bad.items() if reason not in lines[name]] == []
    assert "  not read: 1 .odt; to convert .odt: pandoc" in printed and "~$" not in printed
    code, printed, _ = run(capsys, "search", str(tmp_path / "i"), "rusts", "-n", "1")
    assert code == 0 and "a.pdf, page 1, bytes" in printed
    code, printed, _ = run(capsys, "search", str(tmp_path / "i"), "rusts", "--json", "-n", "1")
    (hit,) = json.loads(printed)
    assert (hit["document"], hit["page"], len(hit["box"])) == ("a.pdf", 1, 4)
    assert documents.file_of(tmp_path / "i", "a.pdf") == docs / "a.pdf"
    assert documents.file_of(tmp_path / "i", "b.md#0") == docs / "b.md"
    assert documents.file_of(tmp_path / "i", "../i/index.json") is None


def test_a_file_is_read_once_also_compressed_and_in_archives_and_what_is_gone_is_forgotten(tmp_path, monkeypatch):
    docs, cache = tmp_path / "docs", tmp_path / "cache"
    docs.mkdir()
    (docs / "a.pdf").write_bytes(pdf([text(72, 700, "Iron rusts.")]))
    (docs / "b.zip").write_bytes(zipped({"c/b.pdf": pdf([text(72, 700, "Tin melts.")])}))
    first = read(docs, cache)
    assert {document.place: (document.text, document.source) for document in first} == {
        "a.pdf": ("Iron rusts.", "pdf"), "b.zip/c/b.pdf": ("Tin melts.", "pdf"),
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("bessemer.data.limited.Helpers.call", lambda *_: pytest.fail("read again"))
        assert [(document.text, document.regions) for document in read(docs, cache)] == [
            (document.text, document.regions) for document in first
        ]
    (docs / "b.zip").unlink()
    read(docs, cache)
    assert len(list(cache.rglob("*.json"))) == 1


def test_a_document_that_is_deleted_while_others_are_read_is_one_line(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.pdf").write_bytes(pdf([text(72, 700, f"Document {name}.")]))
    tally = Tally()
    coming = documents.documents_of(documents.sources_of(str(tmp_path)), tmp_path / "cache", tally)
    assert next(coming).place == "a.pdf"
    (tmp_path / "b.pdf").unlink()
    assert [document.place for document in coming] == ["c.pdf"]
    assert tally.losses == ["b.pdf: No such file or directory"]


def test_a_missing_library_is_one_line_with_the_command_that_installs_it(tmp_path, monkeypatch):
    (tmp_path / "a.docx").write_bytes(b"PK")
    monkeypatch.setattr(files, "is_installed", lambda module: module != "docx")
    tally = Tally()
    assert read(tmp_path, tmp_path / "cache", tally) == []
    assert tally.losses[0].startswith("a.docx: this needs the package 'docx': pip install ")


def test_a_folder_without_a_file_that_can_be_read_is_one_line(tmp_path, capsys):
    code, _, error = run(capsys, "index", str(tmp_path), str(tmp_path / "i"), "--embedder", "none")
    assert code == 2 and f"{tmp_path}: no file here can be read" in error and error.count("\n") == 1


def test_an_index_of_before_pages_were_kept_opens_and_is_brought_up_to_date(tmp_path):
    lancedb = pytest.importorskip("lancedb")
    old = [documents.IndexedDocument("a.md", "Iron rusts."), documents.IndexedDocument("b.md", "Tin melts.")]
    build_index(old, tmp_path / "i", WORDS_ONLY)
    table = lancedb.connect(str(tmp_path / "i" / "versions" / "1")).open_table("passages")
    table.drop_columns(store._LATER_COLUMNS)
    (hit,) = search(open_index(tmp_path / "i"), "rusts", 1, neighbours=1)
    assert (hit.passage.text, hit.passage.page, hit.passage.box, hit.passage.table_header) == ("Iron rusts.", None, None, "")
    regions = (documents.Region(0, 5, 4, (1.0, 2.0, 3.5, 4.0)),)
    new = documents.IndexedDocument("c.pdf", "Lead.", regions=regions)
    summary = build_index([old[0], new], tmp_path / "i", WORDS_ONLY)
    assert (summary.added, summary.changed, summary.deleted) == (1, 0, 1)
    index = open_index(tmp_path / "i")
    assert [search(index, word, 1)[0].passage.page for word in ("rusts", "lead")] == [None, 4]
    assert search(index, "lead", 1)[0].passage.box == (1.0, 2.0, 3.5, 4.0)
    lancedb.connect(str(tmp_path / "i" / "versions" / "2")).open_table("passages").drop_columns(["title"])
    with pytest.raises(ArtefactError, match="have no title; index the documents again"):
        open_index(tmp_path / "i")


def test_a_change_counts_when_the_files_have_come_to_rest():
    states = iter([{"a": (1, 1, 1)}, {"a": (2, 2, 1)}, {"a": (3, 3, 1)}, {"a": (3, 3, 1)}])
    waits = []
    now = documents.wait_for_change(lambda: next(states), {"a": (1, 1, 1)}, 0.5, waits.append)
    assert now == {"a": (3, 3, 1)} and waits == [0.5] * 4


def test_a_watched_folder_is_indexed_at_each_change_until_it_is_interrupted(tmp_path, capsys, monkeypatch):
    docs = tmp_path / "docs"
    docs.mkdir()
    steps = []

    def wait(look, before, seconds):
        steps.append(seconds)
        if len(steps) == 1:
            (docs / "a.md").write_text("Iron rusts.\n", encoding="utf-8")
        elif len(steps) == 2:
            (docs / "b.md").write_text("Tin melts.\n", encoding="utf-8")
            (docs / "a.md").write_text("Iron does not rust in dry air.\n", encoding="utf-8")
        elif len(steps) == 3:
            (docs / "a.md").unlink()
        else:
            raise KeyboardInterrupt
        assert look() != before
        return look()

    monkeypatch.setattr(documents, "wait_for_change", wait)
    code, printed, _ = run(capsys, "index", str(docs), str(tmp_path / "i"), "--embedder", "none", "--watch", "2")
    lines = printed.strip().splitlines()
    assert code == 0 and steps == [2.0] * 4
    assert "no file here can be read" in lines[0] and lines[0].endswith("waiting for a change")
    assert [line.partition("(")[2] for line in lines[1:4]] == ["1 added)", "1 added, 1 changed)", "1 deleted)"]
    assert lines[-1].startswith("no longer watched")
    code, _, error = run(capsys, "index", "python_docs", str(tmp_path / "j"), "--watch", "2", "--embedder", "none")
    assert code == 2 and "only those can be watched" in error


def test_what_is_looked_at_is_what_is_read(tmp_path):
    for name in ("a.md", "b.PDF", "~$c.docx", "d.png", "e.txt.gz", "sub/f.xlsx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    seen = {
        Path(name).relative_to(tmp_path).as_posix() for name in documents.snapshot_of([str(tmp_path), str(tmp_path / "no")])
    }
    assert seen == {"a.md", "b.PDF", "e.txt.gz", "sub/f.xlsx"}
