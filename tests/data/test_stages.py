from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest

from bessemer.core.errors import ConfigError, SourceError, StorageError
from bessemer.core.hashing import hash_files
from bessemer.core.store import Store
from bessemer.data.config import (
    CLEAN_VERSION,
    DEDUPLICATE_VERSION,
    SELECT_VERSION,
    CleanConfig,
    CollectConfig,
    DeduplicateConfig,
    SelectConfig,
)
from bessemer.data.corpus.reader import SCHEMA, document_schema, iterate_documents
from bessemer.data.filters.registry import filter_plugin
from bessemer.data.stages.clean import clean
from bessemer.data.stages.collect import collect
from bessemer.data.stages.deduplicate import deduplicate
from bessemer.data.stages.select import select
from tests.data.test_collect import content_hash


@pytest.fixture(scope="module")
def root(tmp_path_factory, prose):
    """The folder of sixty documents: two thirds good English, copies among them, and some of each kind that is dropped."""
    root = tmp_path_factory.mktemp("stages")
    records = [{"id": n, "text": prose(n % 30)} for n in range(40)]
    records += [{"id": f"short{n}", "text": f"Too short to keep, number {n}, and that is the point of it."} for n in range(8)]
    records += [
        {"id": f"de{n}", "text": f"Der Ofen der {n}. Stahlhütte wurde mit großer Sorgfalt geheizt. " * 12} for n in range(6)
    ]
    records += [{"id": f"code{n}", "text": prose(n) + " = 1000 + 2000000 - 3000" * 12} for n in range(6)]
    (root / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    config = CollectConfig.parse([{"source": "files", "paths": "a.jsonl"}])
    collect(config, made(root, "collected"), cache=root / "cache", folder=root)
    return root


@pytest.fixture
def collected(tmp_path, root):
    """A copy of those documents."""
    shutil.copytree(root / "collected", tmp_path / "collected")
    return tmp_path / "collected" / "documents"


def made(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def rows_of(folder):
    return [row for batch in iterate_documents(folder) for row in batch.to_pylist()]


@pytest.fixture(scope="module")
def metrics(root):
    """What all stages say, with few settings; beside the documents lies what they make."""
    return {
        "clean": clean(CleanConfig(), root / "collected/documents", made(root, "clean")),
        "deduplicate": deduplicate(DeduplicateConfig(), root / "clean/documents", made(root, "dedup")),
        "select": select(SelectConfig.parse("gopher_quality"), root / "dedup/documents", made(root, "select")),
    }


def test_good_documents_stay_and_each_dropped_one_has_its_reason(metrics):
    assert metrics["clean"]["documents_out"] == 60
    assert metrics["deduplicate"]["by_reason"]["duplicate"]["documents"] == 10
    assert {reason: count["documents"] for reason, count in metrics["select"]["by_reason"].items()} == {
        "gopher: words": 8,
        "gopher: words with letter": 6,
        "language": 6,
    }
    assert metrics["select"]["documents_out"] == 30
    for stage in metrics.values():
        dropped = sum(count["documents"] for count in stage["by_reason"].values())
        assert stage["documents_in"] == stage["documents_out"] + dropped
        assert stage["bytes_in"] == stage["bytes_out"] + sum(count["bytes"] for count in stage["by_reason"].values())


def test_the_output_of_these_versions_is_fixed(root, metrics):
    found = {stage: content_hash(rows_of(root / stage / "documents")) for stage in ("clean", "dedup", "select")}
    rejected = content_hash(rows_of(root / "select" / "rejected"))
    assert (CLEAN_VERSION, found["clean"]) == (4, "69492b16cf98ef469c287d2f5c055c1e"), (
        "another output needs another CLEAN_VERSION"
    )
    assert (DEDUPLICATE_VERSION, found["dedup"]) == (4, "887d167acf74e527a0b47acc5aac2bbc"), (
        "another output needs another DEDUPLICATE_VERSION"
    )
    assert (SELECT_VERSION, found["select"], rejected) == (
        5,
        "aa9dcbbf370f2bc0ea5506caed405a51",
        "5279619e3d5f31be3a84d56bc762c949",
    ), "raise SELECT_VERSION"


def test_scores_become_columns_and_drop_nothing(root, metrics):
    schema = document_schema(root / "clean" / "documents")
    columns = [*filter_plugin("gopher_quality").columns, *filter_plugin("gopher_repetition").columns]
    assert schema.names == [*SCHEMA.names, "language_score", *columns]
    assert {str(schema.field(name).type) for name in columns} == {"double"}
    before = [
        {name: row[name] for name in ("id", "text", "metadata", "split")} for row in rows_of(root / "collected/documents")
    ]
    after = [{name: row[name] for name in ("id", "text", "metadata", "split")} for row in rows_of(root / "clean/documents")]
    assert before == after


def test_of_copies_the_one_with_the_smallest_id_survives_and_the_others_name_it(tmp_path, collected):
    deduplicate(DeduplicateConfig(), collected, made(tmp_path, "out"))
    smallest = {}
    for row in rows_of(collected):
        smallest[row["text_hash"]] = min(row["id"], smallest.get(row["text_hash"], "g"))
    assert sorted(row["id"] for row in rows_of(tmp_path / "out/documents")) == sorted(smallest.values())
    for row in rows_of(tmp_path / "out/rejected"):
        assert row["reason"] == f"duplicate of {smallest[row['text_hash']]}"


def test_without_a_method_nothing_is_a_duplicate(tmp_path, collected):
    metrics = deduplicate(DeduplicateConfig.parse([]), collected, made(tmp_path, "out"))
    assert (metrics["documents_out"], metrics["by_reason"]) == (60, {})


def test_examples_are_those_with_the_smallest_ids_shortened(root, metrics):
    shorts = sorted(row["id"] for row in rows_of(root / "select/rejected") if row["reason"].startswith("gopher: words 1"))
    shown = metrics["select"]["examples"]
    examples = shown["dropped"]["gopher: words"]
    assert [example["id"] for example in examples] == shorts[:4]
    assert examples[0]["reason"].startswith("gopher: words 13 < 50")
    assert all(len(example["text"]) <= 602 for example in shown["dropped"]["language"])
    assert len(shown["kept"]) == 4
    json.dumps(metrics, allow_nan=False)


def test_a_users_function_scores_and_a_threshold_uses_it(tmp_path, collected):
    (tmp_path / "mine.py").write_text(
        "def characters(texts):\n    return [len(text) for text in texts.to_pylist()]\n", encoding="utf-8"
    )
    clean(CleanConfig.parse({"score": ["mine.py:characters"]}), collected, made(tmp_path, "clean"), folder=tmp_path)
    config = SelectConfig.parse({"keep": "all", "languages": [], "thresholds": {"characters": {"max": 100}}})
    metrics = select(config, tmp_path / "clean/documents", made(tmp_path, "select"))
    assert metrics["documents_out"] == 8
    assert set(metrics["by_reason"]) == {"characters"}


@pytest.mark.parametrize(
    ("body", "message"), [("return [1.0]", "it returned 1 scores"), ("raise RuntimeError('no')", "it failed: RuntimeError: no")]
)
def test_a_users_score_that_fails_is_named(tmp_path, collected, body, message):
    (tmp_path / "mine.py").write_text(f"def f(texts):\n    {body}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"mine.py:f: {message}"):
        clean(CleanConfig.parse({"score": ["mine.py:f"]}), collected, made(tmp_path, "clean"), folder=tmp_path)


USERS = """
def edit(texts):
    if any("keep, number 3," in text for text in texts.to_pylist()):
        raise KeyError("number 3")
    return texts

def score(texts):
    return [1 / ("Ofen" not in text) for text in texts.to_pylist()]

def mostly(texts):
    return [1 / text.startswith(("Too", "Der")) for text in texts.to_pylist()]
"""


def test_a_users_function_costs_the_documents_on_which_it_fails(tmp_path, collected):
    (tmp_path / "mine.py").write_text(USERS, encoding="utf-8")
    config = CleanConfig.parse({"edit": ["mine.py:edit"], "score": ["mine.py:score"]})
    metrics = clean(config, collected, made(tmp_path, "clean"), folder=tmp_path)
    assert {reason: count["documents"] for reason, count in metrics["by_reason"].items()} == {
        "clean: mine.py:edit: it failed: KeyError: …": 1,
        "clean: mine.py:score: it failed: ZeroDivisionError: division by zero": 6,
    }
    assert {row["score"] for row in rows_of(tmp_path / "clean" / "documents")} == {1.0}
    rejected = rows_of(tmp_path / "clean" / "rejected")
    assert sorted((row["text"][:3], row["score"]) for row in rejected) == [("Der", None)] * 6 + [("Too", 1.0)]


def test_a_users_function_that_fails_on_most_documents_is_taken_for_wrong(tmp_path, collected):
    (tmp_path / "mine.py").write_text(USERS, encoding="utf-8")
    message = "^mine.py:mostly: it failed: ZeroDivisionError: division by zero; so it was with 46 of 60 documents$"
    with pytest.raises(ConfigError, match=message):
        clean(CleanConfig.parse({"score": ["mine.py:mostly"]}), collected, made(tmp_path, "clean"), folder=tmp_path)


def test_a_threshold_on_a_score_that_was_not_computed_is_refused(tmp_path, collected):
    clean(CleanConfig.parse({"score": ["language"]}), collected, made(tmp_path, "clean"))
    with pytest.raises(ConfigError, match=r"no score 'gopher_words'; add it to clean.score"):
        select(SelectConfig.parse("gopher_quality"), tmp_path / "clean/documents", made(tmp_path, "select"))


def test_when_nothing_is_left_the_most_frequent_reason_is_named(tmp_path, root, metrics):
    config = SelectConfig.parse({"languages": [], "thresholds": {"gopher_words": {"min": 5000}}})
    with pytest.raises(SourceError, match="none of 60 documents is usable; most frequent reason: gopher: words"):
        select(config, root / "clean/documents", made(tmp_path, "select"))


def test_a_path_with_pattern_characters_is_taken_as_it_is(tmp_path, collected):
    folder = tmp_path / "a[b]{c}*?"
    collected.parent.rename(folder)
    metrics = deduplicate(DeduplicateConfig(), folder / "documents", made(tmp_path, "out"))
    assert metrics["documents_in"] == 60


def test_a_full_disk_is_told_as_one(tmp_path, collected, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(StorageError, match="the disk is full"):
        clean(CleanConfig(), collected, made(tmp_path, "clean"))


def test_overlap_with_an_evaluation_set_is_named_and_can_be_cut_out(tmp_path, collected, prose):
    clean(CleanConfig.parse({"score": ["language"]}), collected, made(tmp_path, "clean"))
    (tmp_path / "arc.jsonl").write_text(json.dumps({"id": "q7", "question": prose(12)[:200]}) + "\n", encoding="utf-8")
    settings = {"keep": "all", "languages": [], "decontaminate": "arc.jsonl"}
    dropped = select(SelectConfig.parse(settings), tmp_path / "clean/documents", made(tmp_path, "drop"), folder=tmp_path)
    (reason,) = dropped["by_reason"]
    assert reason == "overlap with arc"
    said = {row["reason"] for row in rows_of(tmp_path / "drop/rejected")}
    assert said == {"overlap with arc, item q7"}
    masked = SelectConfig.parse(settings | {"decontaminate_mask": True})
    metrics = select(masked, tmp_path / "clean/documents", made(tmp_path, "mask"), folder=tmp_path)
    assert metrics["documents_out"] == 60
    assert metrics["bytes_out"] < metrics["bytes_in"]
    with pytest.raises(SourceError, match="there is no file"):
        select(SelectConfig.parse(settings | {"decontaminate": "none.jsonl"}), tmp_path / "clean/documents", tmp_path)


def test_copies_of_an_earlier_corpus_are_dropped_and_it_stays_as_it_is(tmp_path, collected):
    deduplicate(DeduplicateConfig(), collected, made(tmp_path, "first"))
    before = hash_files(tmp_path / "first", (tmp_path / "first").rglob("*.parquet"))
    config = DeduplicateConfig.parse({"methods": ["exact"], "against": "first"})
    metrics = deduplicate(config, collected, made(tmp_path, "second"), folder=tmp_path)
    assert metrics["documents_out"] == 0
    assert metrics["by_reason"]["duplicate"]["documents"] == 60
    assert hash_files(tmp_path / "first", (tmp_path / "first").rglob("*.parquet")) == before
    with pytest.raises(ConfigError, match="against: there is no folder"):
        deduplicate(DeduplicateConfig.parse({"against": "none"}), collected, made(tmp_path, "third"), folder=tmp_path)


def test_every_method_of_deduplication_runs_and_tells_what_it_found(tmp_path, collected):
    methods = ["exact", "url", "minhash", "lines", "paragraphs", "sentences", "substrings", "semantic"]
    metrics = deduplicate(DeduplicateConfig.parse(methods), collected, made(tmp_path, "out"))
    assert list(metrics["duplicates"]) == methods
    assert metrics["duplicates"]["exact"]["documents"] == 10
    assert metrics["duplicates"]["minhash"]["documents"] > 20  # the prose differs in a number
    assert not (tmp_path / "out" / ".checkpoints").exists()
    json.dumps(metrics, allow_nan=False)


def test_objections_and_licences_are_heard(tmp_path):
    records = [
        {"id": 1, "text": "one", "metadata": {"opt_out": "noai"}, "license": "MIT"},
        {"id": 2, "text": "two", "license": "MIT"},
        {"id": 3, "text": "three", "license": "GPL-3.0"},
        {"id": 4, "text": "four"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    config = CollectConfig.parse([{"source": "files", "paths": "a.jsonl"}])
    collect(config, made(tmp_path, "collected"), cache=tmp_path, folder=tmp_path)

    def kept(name, **settings):
        config = SelectConfig.parse({"keep": "all", "languages": [], **settings})
        metrics = select(config, tmp_path / "collected/documents", made(tmp_path, name))
        return sorted(row["text"] for row in rows_of(tmp_path / name / "documents")), sorted(metrics["by_reason"])

    assert kept("a") == (["four", "three", "two"], ["opted out"])
    assert kept("b", opted_out="keep", licenses=["MIT"]) == (["one", "two"], ["license: GPL-3.0", "license: unknown"])


def test_a_run_killed_while_outputs_are_hashed_goes_on_from_the_parts_that_are_done(tmp_path, collected, monkeypatch):
    store = Store(tmp_path / "store")
    partial = store.partial("clean-1")
    partial.mkdir(parents=True)
    with monkeypatch.context() as killed:
        killed.setattr("bessemer.core.store.hash_files", lambda *_: pytest.fail("killed"))
        first = clean(CleanConfig(), collected, partial)
        with pytest.raises(pytest.fail.Exception, match="killed"):
            store.publish("clean-1", {})
    monkeypatch.setattr("bessemer.data.stages.transform._transform_part", lambda *_, **__: pytest.fail("a part is done again"))
    assert clean(CleanConfig(), collected, partial) == first
    assert sorted(path.name for path in store.publish("clean-1", {}).folder.iterdir()) == [
        "documents",
        "manifest.json",
        "rejected",
    ]
