from __future__ import annotations

import pyarrow as pa
import pytest

import bessemer
from bessemer.core.errors import ConfigError


def test_tables_go_in_and_kept_and_rejected_tables_come_out(prose):
    texts = [prose(1), prose(1) + "\n", prose(2), "Too short.", "Der Ofen der Hütte wurde mit großer Sorgfalt geheizt. " * 12]
    table = pa.table({"text": texts, "url": [f"https://example.org/{n}" for n in range(5)], "other": list(range(5))})
    settings = {"clean": {"score": ["language", "gopher_quality"]}, "deduplicate": ["exact"], "select": "gopher_quality"}
    kept, rejected = bessemer.refine(table, settings)
    assert sorted(text.strip() for text in kept.column("text").to_pylist()) == [prose(1), prose(2)]
    assert {"gopher_words", "language_score"} <= set(kept.schema.names)
    reasons = dict(zip(rejected.column("rejected_by").to_pylist(), rejected.column("reason").to_pylist(), strict=True))
    assert reasons["deduplicate"].startswith("duplicate of ")
    assert len(kept) + len(rejected) == 5
    assert rejected.column("id").to_pylist() == sorted(rejected.column("id").to_pylist())


def test_without_stages_every_document_is_kept():
    kept, rejected = bessemer.refine(pa.table({"text": ["a", "b"]}))
    assert (len(kept), len(rejected)) == (2, 0)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"txt": ["a"]}, {}, "no column 'text', only txt"),
        ({"text": ["a", None]}, {}, "1 texts are null"),
        ({"text": ["a"]}, {"clen": {}}, "no stage 'clen'; did you mean 'clean'"),
        ({"text": ["a"]}, {"clean": {"skore": []}}, "clean.skore: unknown key 'skore'; did you mean 'score'"),
    ],
)
def test_a_mistake_is_named(columns, settings, message):
    with pytest.raises(ConfigError, match=message):
        bessemer.refine(pa.table(columns), settings)


def test_extract_gives_the_main_text_of_a_page():
    page = "<html><body><nav><a href=/>Home</a></nav><article><h1>Steel</h1><p>Air is blown through the iron.</p></article>"
    assert "Air is blown through the iron." in bessemer.extract(page)
