"""Measures of a search, on cases worked by hand, and BEIR's files."""

from __future__ import annotations

import json
from math import log2

import pytest

from bessemer.core.errors import ArtefactError
from bessemer.retrieval.measures import BeirFolder, measured


def test_measures_are_those_of_a_case_worked_by_hand():
    rankings = [["x", "a", "y", "b"], ["c", "x"], ["x", "y"]]
    judged = [{"a": 2, "b": 1, "x": 0}, {"c": 1}, {"d": 1}]
    found = measured(rankings, judged)
    assert found.success == pytest.approx({1: 1 / 3, 5: 2 / 3, 10: 2 / 3, 20: 2 / 3, 50: 2 / 3})
    assert found.recall[1] == pytest.approx((0 + 1 + 0) / 3) and found.recall[5] == pytest.approx((1 + 1 + 0) / 3)
    assert found.mrr == pytest.approx((1 / 2 + 1 + 0) / 3)
    first = (2 / log2(3) + 1 / log2(5)) / (2 / log2(2) + 1 / log2(3))
    assert found.ndcg == pytest.approx((first + 1 + 0) / 3)


def test_the_best_order_has_an_ndcg_of_one_whatever_the_number_of_right_documents():
    grades = {f"d{number}": 1 + number % 3 for number in range(14)}
    best = sorted(grades, key=lambda name: -grades[name])
    assert measured([best], [grades]).ndcg == pytest.approx(1)


def test_a_query_without_a_right_document_is_refused():
    with pytest.raises(ValueError, match="needs a right document"):
        measured([["a"]], [{"a": 0}])


def test_a_folder_of_beir_is_read_and_what_is_missing_named(tmp_path):
    rows = [{"_id": "d1", "title": "Iron", "text": "Iron rusts."}, {"_id": "d2", "text": "Tin."}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "rust?"}\n{"_id": "q2", "text": "tin?"}\n', encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"test\.tsv: no such file"):
        BeirFolder(tmp_path).queries()
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td1\t0\n", encoding="utf-8"
    )
    assert [(one.place, one.title, one.text) for one in BeirFolder(tmp_path).documents()] == [
        ("d1", "Iron", "Iron rusts."), ("d2", "", "Tin."),
    ]  # fmt: skip
    (query,) = BeirFolder(tmp_path).queries()
    assert (query.query, query.grades) == ("rust?", {"d1": 2.0, "d2": 0.0})
    (tmp_path / "corpus.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"corpus\.jsonl: a line that is no JSON with _id and text"):
        list(BeirFolder(tmp_path).documents())
