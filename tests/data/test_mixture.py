from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.core.errors import ConfigError
from bessemer.data.config import CollectConfig, DeduplicateConfig, MixConfig, SelectConfig
from bessemer.data.corpus.reader import document_id, iterate_documents
from bessemer.data.stages.collect import collect
from bessemer.data.stages.deduplicate import deduplicate
from bessemer.data.stages.mixture import epochs_by_source, iterate_epochs, repeats
from bessemer.data.stages.select import select

SIZES = {"web": 9000, "books": 1000, "empty": 0}


def epochs(sizes=None, **settings):
    return epochs_by_source(MixConfig.parse(settings), sizes or SIZES)


def test_epochs_are_as_said_and_one_where_nothing_is():
    assert epochs(epochs={"books": 2.5}) == {"web": 1.0, "books": 2.5}


def test_weights_are_shares_of_the_bytes():
    found = epochs(weights={"web": 1, "books": 1}, max_bytes=1600)
    assert {name: found[name] * SIZES[name] for name in found} == pytest.approx({"web": 800, "books": 800})


def test_a_source_without_weight_is_left_out():
    assert epochs(weights={"books": 3}, max_bytes=500) == {"web": 0.0, "books": 0.5}


def test_a_source_is_not_read_more_often_than_allowed_and_the_others_fill_up():
    found = epochs(weights={"web": 1, "books": 1})
    assert found == pytest.approx({"web": 6000 / 9000, "books": 4.0})


def test_temperature_lifts_small_sources():
    assert epochs() == pytest.approx({"web": 1.0, "books": 1.0})
    found = epochs(temperature=2, max_bytes=4000)
    assert found["web"] * 9000 / (found["books"] * 1000) == pytest.approx(3)  # the root of nine


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(1, 10**6), st.floats(0.01, 100)), min_size=1),
    st.integers(1, 10**7),
    st.floats(0.1, 8),
)
def test_mixtures_make_what_is_wanted_where_they_can(sources, wanted, most):
    sizes = {name: size for name, (size, _) in sources.items()}
    found = epochs(sizes, weights={name: weight for name, (_, weight) in sources.items()}, max_bytes=wanted, max_epochs=most)
    read = sum(found[name] * sizes[name] for name in sizes)
    assert read == pytest.approx(min(wanted, most * sum(sizes.values())))
    assert all(number <= most * (1 + 1e-9) for number in found.values())


def test_an_unknown_source_is_named():
    with pytest.raises(ConfigError, match="no document is of a source 'boks'; did you mean 'books'"):
        epochs(weights={"boks": 1})


def test_a_share_of_documents_is_chosen_by_their_ids_and_a_larger_one_only_adds():
    ids = pa.array([document_id("x", str(number)) for number in range(4000)])
    sources = pa.array(["x"] * 4000)
    some, more = repeats(ids, sources, {"x": 0.3}), repeats(ids, sources, {"x": 1.6})
    assert some.mean() == pytest.approx(0.3, abs=0.03)
    assert more.mean() == pytest.approx(1.6, abs=0.03)
    assert set(np.flatnonzero(some)) <= set(np.flatnonzero(more == 2))


@pytest.fixture
def collected(tmp_path):
    for name, count in (("web", 300), ("books", 60)):
        records = [{"id": n, "text": f"document {n} of {name} " * 5} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    sources = [{"source": "files", "name": name, "paths": f"{name}.jsonl"} for name in ("web", "books")]
    (tmp_path / "collected").mkdir()
    collect(CollectConfig.parse(sources), tmp_path / "collected", cache=tmp_path, folder=tmp_path)
    return tmp_path / "collected" / "documents"


def rows_of(folder, split):
    return [row for batch in iterate_documents(folder, split=split) for row in batch.to_pylist()]


def test_a_mixture_is_a_column_and_what_came_of_it_stands_beside_what_was_wanted(tmp_path, collected):
    settings = {
        "keep": "all",
        "languages": [],
        "mix": {"epochs": {"web": 0.5, "books": 3}},
        "anneal": {"weights": {"books": 1}},
    }
    metrics = select(SelectConfig.parse(settings), collected, tmp_path / "out")
    rows, validation = (rows_of(tmp_path / "out/documents", split) for split in ("train", "validation"))
    assert {row["epochs"] for row in rows if row["source"] == "books"} == {3}
    assert all(row["epochs"] + row["anneal_epochs"] > 0 for row in rows)
    stats = metrics["mixtures"]["epochs"]
    assert stats["books"]["bytes"] == stats["books"]["expected_bytes"]
    assert stats["web"]["bytes"] == pytest.approx(stats["web"]["expected_bytes"], rel=0.25)
    assert metrics["mixtures"]["anneal_epochs"]["web"]["bytes"] == 0
    assert set(metrics["by_reason"]) == {"mixture: web"}
    validation = [
        row for batch in iterate_documents(tmp_path / "out/documents", split="validation") for row in batch.to_pylist()
    ]
    assert validation
    assert {row["epochs"] for row in validation} == {1}


def test_a_mixture_of_what_copies_leave_shares_out_that_alone(tmp_path):
    for name, texts in (("web", 100), ("books", 60)):
        records = [{"id": n, "text": f"document {n % texts} of {name} " * 5} for n in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    sources = [{"source": "files", "name": name, "paths": f"{name}.jsonl"} for name in ("web", "books")]
    (tmp_path / "collected").mkdir()
    collect(CollectConfig.parse(sources), tmp_path / "collected", cache=tmp_path, folder=tmp_path)
    settings = DeduplicateConfig.parse({"methods": ["exact"], "mix": {"weights": {"web": 1, "books": 1}, "max_bytes": 3000}})
    stats = deduplicate(settings, tmp_path / "collected/documents", tmp_path / "out")["mixtures"]["epochs"]
    rows = rows_of(tmp_path / "out/documents", "train")
    for name in ("web", "books"):
        assert stats[name]["expected_bytes"] == 1500
        assert stats[name]["bytes"] == pytest.approx(1500, rel=0.4)
        assert stats[name]["bytes"] == sum(row["epochs"] * len(row["text"]) for row in rows if row["source"] == name)


def test_a_mixture_for_the_end_alone_takes_no_document_from_the_rest(tmp_path, collected):
    settings = {"keep": "all", "languages": [], "anneal": {"weights": {"books": 1}}}
    select(SelectConfig.parse(settings), collected, tmp_path / "out")
    rows = rows_of(tmp_path / "out/documents", "train")
    assert {row["source"] for row in rows} == {"web", "books"}
    assert all((row["anneal_epochs"] > 0) == (row["source"] == "books") for row in rows)


def test_readings_go_once_over_all_before_they_repeat_and_can_be_skipped(tmp_path, collected):
    settings = {"keep": "all", "languages": [], "mix": {"epochs": {"web": 0.5, "books": 2}}}
    select(SelectConfig.parse(settings), collected, tmp_path / "out")

    def read(skip=0):
        batches = iterate_epochs(tmp_path / "out/documents", ["id", "source"], "train", batch_rows=7, skip=skip)
        return [tuple(row.values()) for batch in batches for row in batch.to_pylist()]

    everything = read()
    books = [identity for identity, source in everything if source == "books"]
    assert books == books[: len(books) // 2] * 2
    assert everything[-1][1] == "books"
    assert len({identity for identity, _ in everything}) == len(everything) - len(books) // 2
    for skip in (1, 50, len(everything) - 1, len(everything)):
        assert read(skip) == everything[skip:]
