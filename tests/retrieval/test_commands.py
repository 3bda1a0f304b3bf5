"""`bessemer index` and `search`, as typed."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from bessemer.cli.main import main
from bessemer.core.progress import Silent
from bessemer.core.store import locked_folder
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import IndexedDocument, build_index
from tests.serving.running import babbling_engine

pytest.importorskip("lancedb")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out = capsys.readouterr()
    return ended.value.code, out.out, out.err


def test_a_folder_is_indexed_searched_and_brought_up_to_date(tmp_path, capsys):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "metal.md").write_text("# Iron\n\nIron rusts in water.\n", encoding="utf-8")
    (docs / "page.html").write_text(
        "<html><body><h1>Copper</h1><p>Copper turns green in the open air.</p></body></html>", encoding="utf-8"
    )
    (docs / "photo.png").write_bytes(b"\x89PNG")
    out = tmp_path / "i"
    code, printed, _ = run(capsys, "index", str(docs), str(out), "--embedder", "none")
    assert code == 0 and "2 documents, 2 passages (2 added)" in printed
    code, printed, _ = run(capsys, "search", str(out), "what rusts?")
    assert code == 0 and "metal.md#0, bytes 8 to 28" in printed and "Iron rusts in water." in printed
    (docs / "metal.md").write_text("# Iron\n\nIron melts at 1538 degrees.\n", encoding="utf-8")
    code, printed, _ = run(capsys, "index", str(docs), str(out))
    assert code == 0 and "(1 changed)" in printed
    code, printed, _ = run(capsys, "search", str(out), "melts", "--json", "-n", "1")
    (hit,) = json.loads(printed)
    assert hit["text"] == "Iron melts at 1538 degrees." and hit["ranks"] == {"words": 1}


def test_a_question_is_answered_by_a_models_folder_with_sources_and_marks(tmp_path, capsys):
    babbling_engine(tmp_path / "engine", context=2048)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "metal.md").write_text("Iron rusts in water.\n", encoding="utf-8")
    index, model = str(tmp_path / "i"), str(tmp_path / "engine" / "model")
    run(capsys, "index", str(tmp_path / "docs"), index, "--embedder", "none")
    code, printed, _ = run(capsys, "ask", model, index, "Does iron rust?", "--max-tokens", "24", "--json", "--device", "cpu")
    answer = json.loads(printed)
    assert code == 0 and answer["is_held"] and [source["document"] for source in answer["sources"]] == ["metal.md#0"]
    assert all(set(one["cited"]) <= {1} for one in answer["statements"])
    code, printed, _ = run(capsys, "ask", model, index, "Does iron rust?", "--max-tokens", "24", "--device", "cpu")
    assert code == 0 and "[1] metal.md#0, bytes 0 to 20" in printed
    quoted = ("--sources", "each", "--quote", "--device", "cpu")
    code, printed, _ = run(capsys, "ask", model, index, "Does iron rust?", *quoted)
    assert code == 0 and "“Iron rusts in water” [1]." in printed
    code, _, error = run(capsys, "ask", model, index, "Does iron rust?", "--sources", "eech")
    assert code == 2 and "--sources eech: it is together, each; did you mean 'each'?" in error
    code, printed, _ = run(capsys, "ask", model, index, "zebra", "--device", "cpu")
    assert code == 0 and "The documents do not answer this." in printed


def test_a_full_disk_is_one_line_and_the_old_index_answers_until_there_is_room(tmp_path, capsys, monkeypatch):
    docs, out = tmp_path / "docs", str(tmp_path / "i")
    docs.mkdir()
    (docs / "metal.md").write_text("Iron rusts in water.\n", encoding="utf-8")
    run(capsys, "index", str(docs), out, "--embedder", "none")
    (docs / "other.md").write_text("Copper turns green.\n", encoding="utf-8")

    def full(*_, **__):
        # as LanceDB 0.40 says it on a small tmpfs
        raise RuntimeError("lance error: LanceError(IO): No space left on device (os error 28), structural.rs:258:9")

    with monkeypatch.context() as patch:
        patch.setattr("lancedb.table.LanceTable.add", full)
        code, _, error = run(capsys, "index", str(docs), out)
    assert code == 2 and error.startswith("error: the disk is full") and error.count("\n") == 1
    code, printed, _ = run(capsys, "search", out, "rusts")
    assert code == 0 and "metal.md#0" in printed
    code, printed, _ = run(capsys, "index", str(docs), out)
    assert code == 0 and "2 documents, 2 passages (1 added)" in printed


def test_a_second_writer_waits_says_so_and_a_reader_is_answered_meanwhile(tmp_path, capsys, monkeypatch):
    docs, out = tmp_path / "docs", tmp_path / "i"
    docs.mkdir()
    (docs / "metal.md").write_text("Iron rusts in water.\n", encoding="utf-8")
    run(capsys, "index", str(docs), str(out), "--embedder", "none")
    with locked_folder(out):
        code, printed, _ = run(capsys, "search", str(out), "rusts")
    assert code == 0 and "metal.md#0" in printed
    said = []

    class FirstWriterEnds(Silent):
        def say(self, line):
            first.close()
            said.append(line)

    with ExitStack() as first:
        first.enter_context(locked_folder(out))
        summary = build_index([IndexedDocument("metal.md#0", "Gold does not.")], out, progress=FirstWriterEnds())
    assert summary.changed == 1 and "another process is at work in this folder; waiting" in said[0]
    monkeypatch.setattr("bessemer.retrieval.index.PATIENCE", 0)
    with locked_folder(out):
        code, _, error = run(capsys, "index", str(docs), str(out))
    assert code == 2 and error.splitlines()[-1].startswith("error: ") and "another process is at work" in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["index", "nowhere", "OUT", "--embedder", "none"], "nowhere: no such file or folder, and no source of this name"),
        (["index", "FOLDER", "OUT", "--embedder", "none"], "no file here can be read (1 .odt; to convert .odt: pandoc"),
        (["index", "FOLDER", "OUT", "--embedder", "elsewhere"], "no file here can be read"),
        (["search", "FOLDER", "iron"], "no index of documents is here; bessemer index DOCS"),
        (["search", "FOLDER", "iron", "--mode", "wrods"], "--mode wrods: it is hybrid, words, meaning"),
        (["search", "FOLDER", "iron", "--rerank", "wrods"], "there is no model 'wrods': not a folder"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, arguments, reason):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "report.odt").write_bytes(b"PK")
    places = {"FOLDER": str(folder), "OUT": str(tmp_path / "out")}
    code, _, error = run(capsys, *(places.get(argument, argument) for argument in arguments))
    assert code == 2 and reason in error and error.count("\n") == 1


def test_a_section_is_found_and_answered_from_in_place_of_a_passage(tmp_path, capsys):
    babbling_engine(tmp_path / "engine", context=2048)
    text = "# Metals\n\nIron rusts in water.\n\n## Copper\n\nCopper turns green.\n"
    build_index([IndexedDocument("metal.md", text)], tmp_path / "i", IndexConfig(embedder="none"))
    index, model = str(tmp_path / "i"), str(tmp_path / "engine" / "model")
    code, printed, _ = run(capsys, "search", index, "rusts", "--section", "500", "--json")
    (hit,) = json.loads(printed)
    assert code == 0 and hit["text"] == "Iron rusts in water.\n\n# Copper\n\nCopper turns green."
    assert hit["found"] == [[10, 30]] and (hit["start"], hit["end"]) == (10, len(text) - 1)
    asked = ("ask", model, index, "What rusts?", "--section", "500", "--quote", "--json", "--device", "cpu")
    code, printed, _ = run(capsys, *asked)
    (quote,) = json.loads(printed)["quotes"]
    assert code == 0 and text[quote["start"] : quote["end"]] == quote["text"]
    code, _, error = run(capsys, "search", index, "rusts", "--section", "500", "--neighbours", "1")
    assert code == 2 and "--neighbours, --section: the one adds passages" in error
