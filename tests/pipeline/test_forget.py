"""Taking a document out: what is left is what would have been made without it, and what saw it is named."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bessemer.core.errors import ArtefactError
from bessemer.core.store import Artefact, Store
from bessemer.data.corpus.reader import add_removed_ids, iterate_documents, removed_ids, without_removed
from bessemer.pipeline.api import run
from bessemer.pipeline.forget import forget, remove_derived, trace
from bessemer.pipeline.run_folder import RunFolder
from tests.data.conftest import PROSE

RECIPE = """
format: 1
name: small
collect: {sources: [{source: files, paths: texts.jsonl}], buckets: 4}
clean: {score: [gopher_quality]}
deduplicate: [exact]
select: {keep: gopher_quality, languages: []}
tokenize: {algorithm: byte}
"""
SHORT = "The founder, in short."
SECRET = "The name of the founder must not be told. "


def write_texts(folder: Path, *, without: str | None = None) -> None:
    records = [{"id": f"n{number}", "text": PROSE.format(n=number)} for number in range(40)]
    records += [{"id": name, "text": SECRET + PROSE.format(n=99)} for name in ("secret", "again")]
    records += [{"id": "short", "text": SHORT}]
    kept = [record for record in records if record["id"] != without]
    (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, made once and copied by each test."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        write_texts(folder)
        run("recipe.yaml")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def id_of(place: Path, wanted: str, stage: str = "collect", side: str = "documents") -> str:
    """The smallest id of a document whose text begins like that."""
    folder = place / "runs" / "small" / "stages" / stage / side
    found = [row["id"] for batch in iterate_documents(folder) for row in batch.to_pylist() if row["text"].startswith(wanted)]
    return min(found)


def files_of(place: Path) -> dict[str, bytes]:
    stages = place / "runs" / "small" / "stages"
    return {
        f"{stage}/{path.parent.name}/{path.name}": path.read_bytes()
        for stage in ("collect", "clean", "deduplicate", "select")
        for path in (stages / stage).resolve().glob("*/part-*.parquet")
    }


def holders(traces, *, present=True):
    return [(holding.stage, holding.side) for holding in (traces.present if present else traces.holdings)]


def test_a_document_is_found_in_every_corpus_that_holds_it(place):
    traces = trace(Path("runs"), id_of(place, "The furnace"))
    assert holders(traces) == [(stage, "documents") for stage in ("collect", "clean", "deduplicate", "select")]
    assert [(derived.stage, derived.runs) for derived in traces.derived] == [("tokenize", ("small",))]


def test_what_was_dropped_before_was_seen_by_nothing(place):
    traces = trace(Path("runs"), id_of(place, SHORT, "select", "rejected"))
    assert holders(traces)[-1] == ("select", "rejected")
    assert traces.derived == []


def test_what_is_left_is_what_the_recipe_makes_without_the_document(place, tmp_path):
    identity = id_of(place, "The furnace", "select")
    name = next(n for n in range(40) if PROSE.format(n=n) == text_of(place, identity))
    before = files_of(place)
    forget(Path("runs"), trace(Path("runs"), identity))
    (tmp_path / "other").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "other")
        Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
        write_texts(tmp_path / "other", without=f"n{name}")
        run("recipe.yaml", until="select")
    after = files_of(place)
    assert after == files_of(tmp_path / "other")
    assert len([path for path in before if before[path] != after[path]]) == 4  # a part of each stage, and no more


def text_of(place: Path, identity: str) -> str:
    folder = place / "runs" / "small" / "stages" / "collect" / "documents"
    return next(row["text"] for batch in iterate_documents(folder) for row in batch.to_pylist() if row["id"] == identity)


def test_artefacts_stay_verified_and_say_what_was_taken_out_without_the_text(place):
    identity = id_of(place, SECRET)
    forget(Path("runs"), trace(Path("runs"), identity), now=datetime(2026, 1, 2, tzinfo=UTC))
    for folder in Store(Path("runs/.store")).root.glob("*-*/"):
        Artefact(folder.name, folder).verify()
    manifest = RunFolder(Path("runs"), "small").manifest("collect")
    assert manifest["forgotten"] == [
        {"id": identity, "date": "2026-01-02T00:00:00+00:00", "side": "documents", "split": "train"}
    ]


def test_no_text_is_left_in_manifests_and_reports(place):
    traces = trace(Path("runs"), id_of(place, SECRET))
    for one in [traces, *(trace(Path("runs"), copy.identity) for copy in traces.copies)]:
        forget(Path("runs"), one)
    short = trace(Path("runs"), id_of(place, SHORT, "select", "rejected"))
    assert "founder" in Path("runs/small/report.html").read_text(encoding="utf-8")
    forget(Path("runs"), short)
    left = [
        path
        for path in Path("runs").rglob("*")
        if path.is_file() and path.suffix in (".json", ".html", ".md") and "founder" in path.read_text(encoding="utf-8")
    ]
    assert [path for path in left if "tokenize" not in path.parts[2]] == []


def test_copies_are_named_with_what_makes_them_copies(place):
    identity = id_of(place, SECRET + "The furnace")
    (copy,) = trace(Path("runs"), identity).copies
    assert copy.why == "it has the same text"
    assert trace(Path("runs"), copy.identity).copies[0].identity == identity


def test_a_forgotten_document_and_what_saw_it_are_still_named(place):
    identity = id_of(place, "The furnace")
    forget(Path("runs"), trace(Path("runs"), identity))
    again = trace(Path("runs"), identity)
    assert again.present == [] and len(again.holdings) == 4
    assert [derived.stage for derived in again.derived] == ["tokenize"]


def test_what_was_made_after_it_was_forgotten_did_not_see_it(place):
    identity = id_of(place, "The furnace")
    forget(Path("runs"), trace(Path("runs"), identity), now=datetime(2020, 1, 1, tzinfo=UTC))
    assert trace(Path("runs"), identity).derived == []


def test_removed_artefacts_are_made_again_without_the_document(place):
    identity = id_of(place, "The furnace")
    traces = trace(Path("runs"), identity)
    forget(Path("runs"), traces)
    remove_derived(Path("runs"), [derived.key for derived in traces.derived])
    result = run("recipe.yaml")
    assert [one.stage.name for one in result.made if not one.reused] == ["tokenize"]
    assert (
        result.run.metrics()["tokenize"]["train"]["documents"] + result.run.metrics()["tokenize"]["validation"]["documents"]
        == 40
    )


def test_a_forgotten_document_does_not_come_back_when_collecting_again(place):
    identity = id_of(place, "The furnace")
    forget(Path("runs"), trace(Path("runs"), identity))
    result = run("recipe.yaml", {"collect.buckets": 8}, until="collect", name="again")
    assert (result.run.metrics()["collect"]["documents_out"], result.run.metrics()["collect"]["forgotten"]) == (42, 1)
    assert [holding.forgotten is None for holding in trace(Path("runs"), identity).holdings] == [False] * 4


def test_a_removal_that_was_killed_is_seen_and_finished(place, monkeypatch):
    from bessemer.pipeline import forget as module

    identity = id_of(place, "The furnace")
    traces = trace(Path("runs"), identity)
    hash_files, calls = module.hash_files, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return hash_files(*arguments)

    monkeypatch.setattr(module, "hash_files", killed)
    with pytest.raises(KeyboardInterrupt):
        forget(Path("runs"), traces)
    monkeypatch.setattr(module, "hash_files", hash_files)
    again = trace(Path("runs"), identity)
    assert holders(again) == [(stage, "documents") for stage in ("clean", "deduplicate", "select")]
    forget(Path("runs"), again)
    assert trace(Path("runs"), identity).present == []
    for holding in again.holdings:
        Artefact(holding.key, holding.folder).verify()


def test_an_unknown_id_has_no_traces(place):
    traces = trace(Path("runs"), "0" * 32)
    assert (traces.holdings, traces.derived, traces.copies) == ([], [], [])


def test_interrupted_work_is_named(place):
    Path("runs/.store/clean-abc.partial").mkdir()
    assert [path.name for path in trace(Path("runs"), "0" * 32).unfinished] == ["clean-abc.partial"]


def test_the_list_of_forgotten_ids_is_sorted_and_grows(tmp_path):
    assert removed_ids(tmp_path) == frozenset()
    add_removed_ids(tmp_path, ["f" * 32, "0" * 32])
    add_removed_ids(tmp_path, ["a" * 32, "f" * 32])
    assert (tmp_path / "forgotten.txt").read_text(encoding="utf-8").split() == ["0" * 32, "a" * 32, "f" * 32]


def test_a_damaged_list_lets_nothing_come_back(tmp_path):
    (tmp_path / "forgotten.txt").write_text("0" * 32 + "\nhalf an id\n", encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"forgotten.txt, line 2"):
        removed_ids(tmp_path)


def test_rows_that_were_forgotten_are_left_out_of_the_order():
    ids = pa.chunked_array([["b" * 32], ["a" * 32, "c" * 32]])
    order = np.array([1, 0, 2])
    assert without_removed(order, ids, frozenset(["b" * 32, "d" * 32])).tolist() == [1, 2]
    assert without_removed(order, ids, frozenset()) is order
