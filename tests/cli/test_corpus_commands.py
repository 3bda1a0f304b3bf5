"""`bessemer show CORPUS`, `bessemer explain` and `bessemer forget`."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from bessemer.pipeline.api import run
from tests.cli.test_main import bessemer, one_error
from tests.data.conftest import PROSE

RECIPE = """
format: 1
name: small
collect: [{source: files, paths: texts.jsonl}]
clean: {edit: [pii], score: [language, gopher_quality]}
deduplicate: [exact]
select: {keep: gopher_quality}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        records = [{"id": f"n{number}", "text": PROSE.format(n=number % 30)} for number in range(40)]
        records += [{"id": "short", "text": "Too [bold]short[/bold] \x1b[2J and it has an address, jane.doe@gmail.com."}]
        (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        run("recipe.yaml")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path / "place"


def example(kind: str, reason: str = "") -> str:
    """The id of a document that `select` kept, or dropped for a reason."""
    examples = json.loads(Path("runs/small/stages/select/manifest.json").read_text(encoding="utf-8"))["metrics"]["examples"][
        kind
    ]
    return (examples[reason] if reason else examples)[0]["id"]


def short() -> str:
    examples = json.loads(Path("runs/small/stages/select/manifest.json").read_text(encoding="utf-8"))["metrics"]["examples"][
        "dropped"
    ]
    return next(row["id"] for rows in examples.values() for row in rows if "address" in row["text"])


@pytest.mark.parametrize("thing", ["runs/small/corpus", "runs/small/stages/select", "runs/small/corpus/documents"])
def test_a_corpus_is_shown_with_the_line_that_led_to_it(capsys, place, thing):
    code, out, _ = bessemer(capsys, "show", thing)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["collect", "clean", "deduplicate", "select"]
    for expected in ("Thresholds of select", "Copies found by exact", "Personal data emails", "By language", "Dropped: "):
        assert expected in out
    assert "[bold]short[/bold]" in out and "\x1b" not in out


def test_as_many_examples_are_shown_as_asked_for(capsys, place):
    _, out, _ = bessemer(capsys, "show", "runs/small/corpus", "--examples", 0)
    assert "Dropped: " not in out and "furnace" not in out


def test_documents_without_a_manifest_are_shown(capsys, place):
    shutil.copytree("runs/small/corpus/documents", "bare/documents")
    shutil.copytree("runs/small/corpus/rejected", "bare/rejected")
    code, out, _ = bessemer(capsys, "show", "bare")
    assert code == 0
    assert "30" in out and "1 (3.2 %)" in out
    code, out, _ = bessemer(capsys, "show", "bare/rejected")
    assert code == 0
    assert "dropped by" not in out.lower()


@pytest.mark.parametrize("thing", ["small", "runs/small/corpus", "runs/small/corpus/documents"])
def test_the_card_is_printed_as_it_lies_beside_the_documents(capsys, place, thing):
    code, out, _ = bessemer(capsys, "show", thing, "--card")
    assert code == 0
    assert out == Path("runs/small/corpus/README.md").read_text(encoding="utf-8")


def test_what_has_no_manifest_has_no_card(capsys, place):
    shutil.copytree("runs/small/corpus/documents", "bare/documents")
    code, _, err = bessemer(capsys, "show", "bare", "--card")
    assert code == 2
    assert "manifests of data stages" in one_error(err)


def test_a_text_is_explained_by_everything_there_is(capsys, place):
    code, out, _ = bessemer(capsys, "explain", "Write to jane.doe@gmail.com [red]now[/red].")
    assert code == 0
    for expected in ("gopher_quality drops it: gopher: words", "[-jane.doe@gmail.com-]{+<EMAIL>+} [red]now", "hazards: hate"):
        assert expected in out


@pytest.mark.parametrize(
    ("thing", "expected"),
    [
        ("missing.txt", "missing.txt: there is no such file"),
        ("my missing page.HTML", "there is no such file"),
        ("pages/one", "there is no such file"),
        ("runs", "this is a folder"),
        ("00070ad67053bce7a767f8497f9adb05", "say of which run with --run"),
    ],
)
def test_what_names_no_file_is_not_explained_letter_by_letter(capsys, place, thing, expected):
    code, out, err = bessemer(capsys, "explain", thing)
    assert (code, out) == (2, "") and expected in one_error(err)


def test_an_address_is_judged_as_an_address(capsys, place):
    code, out, _ = bessemer(capsys, "explain", "https://porn.example/hardcore")
    assert code == 0 and out.startswith("urls drops it: ") and "gopher" not in out
    code, _, err = bessemer(capsys, "explain", "https://porn.example/hardcore", "--run", "small")
    assert code == 2 and "and --url https://porn.example/hardcore" in one_error(err)
    _, out, _ = bessemer(capsys, "explain", "A study of casino and porn, too short.", "--json")
    assert "urls" not in json.loads(out)["reasons"]


def test_a_text_is_explained_by_a_run(capsys, place):
    code, out, _ = bessemer(capsys, "explain", PROSE.format(n=77), "--run", "small")
    assert code == 0
    assert out.startswith("It is kept.")
    assert "hazards" not in out
    code, out, _ = bessemer(capsys, "explain", "Der Ofen wurde mit Sorgfalt geheizt.", "--run", "small")
    assert out.startswith("It is dropped: language: de")
    assert "It breaks as well: gopher: words" in out


def test_a_text_is_explained_by_a_recipe_that_was_not_run(capsys, place):
    Path("other.yaml").write_text(RECIPE.replace("gopher_quality}", "all}"), encoding="utf-8")
    code, out, _ = bessemer(capsys, "explain", "This is plain English text, and it is kept.", "--recipe", "other.yaml")
    assert code == 0
    assert out.startswith("It is kept.")


def test_a_document_of_a_run_is_looked_up_with_what_became_of_it(capsys, place):
    code, out, _ = bessemer(capsys, "explain", short(), "--run", "small")
    assert code == 0
    rows = [line.split() for line in out.splitlines()[1:5]]
    assert [row[0] for row in rows] == ["collect", "clean", "deduplicate", "select"]
    assert [("dropped" in row) for row in rows] == [False, False, False, True]
    assert "{+<EMAIL>+}" in out


def test_an_explanation_can_be_read_by_programs(capsys, place):
    code, out, _ = bessemer(capsys, "explain", short(), "--run", "small", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["is_kept"] is False and found["history"][-1]["side"] == "rejected"
    assert found["edits"][0]["changes"][0]["after"] == "<EMAIL>"


def test_files_and_pages_and_what_is_typed_are_texts(capsys, place, monkeypatch):
    Path("a.txt").write_bytes(b"Plain bytes, \xff and more.")
    _, out, _ = bessemer(capsys, "explain", "a.txt", "--json")
    assert json.loads(out)["text"] == "Plain bytes, \ufffd and more."
    paragraphs = "".join(f"<p>{PROSE.format(n=number)}</p>" for number in range(3))
    Path("a.html").write_text(
        f"<html><body><nav>Home Shop</nav><article><h1>Steel</h1>{paragraphs}</article></body></html>", encoding="utf-8"
    )
    _, out, _ = bessemer(capsys, "explain", "a.html", "--json")
    assert "furnace" in json.loads(out)["text"] and "<p>" not in json.loads(out)["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Typed."))
    _, out, _ = bessemer(capsys, "explain", "-", "--json")
    assert json.loads(out)["text"] == "Typed."


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["explain", "0" * 32, "--run", "small"], "it has no document"),
        (["explain", "text", "--run", "smal"], "did you mean 'small'?"),
        (["explain", "text", "--run", "small", "--recipe", "recipe.yaml"], "give one of --run and --recipe"),
        (["explain", "text", "--recipe", "none.yaml"], "no such recipe file"),
        (["explain", "empty.html"], "no main text"),
        (["explain", "text", "--tokenizer", "none"], "there is no tokenizer 'none'"),
        (["forget", "abc"], "is not the id of a document"),
        (["forget", "0" * 32], "no corpus here holds"),
        (["forget", "0" * 32, "--runs", "elsewhere"], "there is no store here"),
    ],
)
def test_a_mistake_is_one_line(capsys, place, arguments, expected):
    Path("empty.html").write_text("<html></html>", encoding="utf-8")
    code, _, err = bessemer(capsys, *arguments)
    assert code == 2
    assert expected in one_error(err)


def test_a_dry_run_forgets_nothing(capsys, place):
    identity = example("kept")
    code, out, _ = bessemer(capsys, "forget", identity, "--dry-run")
    assert code == 0
    assert [line.split(":")[0].split("-")[0].strip() for line in out.splitlines() if line.startswith("  in ")] == [
        "in collect", "in clean", "in deduplicate", "in select",
    ]  # fmt: skip
    assert not Path("runs/.store/forgotten.txt").exists()


def test_nothing_is_forgotten_without_a_yes(capsys, place, monkeypatch):
    monkeypatch.setattr("typer.confirm", lambda question: False)
    code, _, _ = bessemer(capsys, "forget", example("kept"))
    assert code == 1
    assert not Path("runs/.store/forgotten.txt").exists()


def test_a_document_is_forgotten_with_its_copies(capsys, place):
    folder = Path("runs/small/stages/deduplicate/manifest.json")
    (cluster, *_) = json.loads(folder.read_text(encoding="utf-8"))["metrics"]["duplicates"]["exact"]["largest"]
    code, out, _ = bessemer(capsys, "forget", cluster["id"], "--copies", "--yes")
    assert code == 0
    assert out.endswith("Done.\n")
    assert len(Path("runs/.store/forgotten.txt").read_text(encoding="utf-8").split()) == cluster["size"]
    code, out, _ = bessemer(capsys, "forget", cluster["id"], "--yes")
    assert code == 0
    assert out.count("forgotten on") == 4 and "Done" not in out
    code, _, err = bessemer(capsys, "explain", cluster["id"], "--run", "small")
    assert code == 2 and "it has no document" in one_error(err)
