from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bessemer
from bessemer.core.errors import ConfigError
from bessemer.data.deduplication.methods import _embedded
from bessemer.data.sources.io.fetch import Clock


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


def test_no_copy_goes_for_one_that_is_dropped():
    """The copy with the smallest id has a licence that nobody wants: were copies taken out first, nothing would be left."""
    ids = [f"{number:032x}" for number in range(3)]
    table = pa.table({"id": ids, "text": ["The same text."] * 3, "license": ["GPL-3.0", "MIT", "MIT"]})
    kept, rejected = bessemer.refine(
        table, {"deduplicate": ["exact"], "select": {"keep": [], "languages": [], "licenses": ["MIT"]}}
    )
    assert kept.column("id").to_pylist() == ids[1:2]
    assert rejected.column("reason").to_pylist() == ["license: GPL-3.0", f"duplicate of {ids[1]}"]


def test_of_copies_that_are_kept_the_settings_say_which_is_best():
    table = pa.table({"text": ["The same text."] * 2, "id": ["0" * 32, "1" * 32], "license": [None, "MIT"]})
    kept, _ = bessemer.refine(table, {"deduplicate": ["exact"]})
    assert kept.column("id").to_pylist() == ["1" * 32]
    with pytest.raises(ConfigError, match=r"deduplicate\.keep\.quality: the documents have no score 'mine'"):
        bessemer.refine(table, {"deduplicate": {"keep": {"quality": "mine"}}})


def test_a_users_embeddings_are_asked_for_again_where_a_network_failed_them():
    errors, waits = [ConnectionError("no route")] * 2, []

    def embed(texts):
        if errors:
            raise errors.pop()
        return [[1.0]] * len(texts)

    assert _embedded(embed, "mine.py:embed", pa.array(["a", "b"]), Clock(waits.append)).tolist() == [[1.0], [1.0]]
    assert waits == [1.0, 2.0]


def test_semantic_copies_are_those_of_the_users_model(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def by_length(texts):\n    return np.array([[len(text) > 5, len(text) <= 5] for text in texts.to_pylist()])\n"
        "def none(texts):\n    return np.zeros(3)\n",
        encoding="utf-8",
    )
    table = pa.table({"text": ["one", "two", "a longer one", "another long one"]})
    settings = {"methods": ["semantic"], "semantic": {"embeddings": "mine.py:by_length", "clusters": 1}}
    kept, rejected = bessemer.refine(table, {"deduplicate": settings}, folder=tmp_path)
    assert sorted(len(text) > 5 for text in kept.column("text").to_pylist()) == [False, True]
    settings["semantic"]["embeddings"] = "mine.py:none"
    with pytest.raises(ConfigError, match=r"mine\.py:none: it returned an array of shape \(3,\) for 1 texts"):
        bessemer.refine(table, {"deduplicate": settings}, folder=tmp_path)
    vectors = pa.table({"id": ["0" * 32, "1" * 32], "embedding": [[1.0, 0.1], [1.0, 0.1]]})
    pq.write_table(vectors, tmp_path / "vectors.parquet")
    settings["semantic"]["embeddings"] = "vectors.parquet"
    two = pa.table({"text": ["iron", "steel"], "id": ["0" * 32, "1" * 32]})
    _, rejected = bessemer.refine(two, {"deduplicate": settings}, folder=tmp_path)
    assert rejected.column("reason").to_pylist() == [f"semantic duplicate of {'0' * 32} (1.00)"]


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


CONTACT = "Write to jane@steel.org or call +49 30 901820. password = 'k4lb-Tr0ub4dor'"


def test_a_recipe_says_which_personal_data_are_masked_and_by_what():
    settings = {"edit": ["pii"], "score": [], "personal_data": {"kinds": ["email"], "masks": {"email": ""}}}
    kept, _ = bessemer.refine(pa.table({"text": [CONTACT]}), {"clean": settings | {"secrets": {"masks": {"password": "?"}}}})
    assert kept.column("text").to_pylist() == ["Write to  or call +49 30 901820. password = '?'"]
    assert kept.column("personal_data_emails").to_pylist() == [1]
    assert kept.column("personal_data_phones").to_pylist() == [0]


def test_documents_with_personal_data_can_be_dropped_by_kind_or_all():
    texts = pa.table({"text": [CONTACT, "Write to jane@steel.org.", "Nothing here."]})
    clean = {"edit": ["pii"], "score": []}
    kept, dropped = bessemer.refine(texts, {"clean": clean, "select": {"keep": ["personal_data", "secrets"], "languages": []}})
    assert kept.column("text").to_pylist() == ["Nothing here."]
    assert set(dropped.column("reason").to_pylist()) == {"personal data: emails 1 > 0"}
    by_kind = {"keep": "all", "languages": [], "thresholds": {"personal_data_phones": {"max": 0}}}
    kept, dropped = bessemer.refine(texts, {"clean": clean, "select": by_kind})
    assert sorted(kept.column("text").to_pylist()) == ["Nothing here.", "Write to <EMAIL>."]
    assert dropped.column("reason").to_pylist() == ["personal data: phones 1 > 0"]


def test_the_settings_of_each_edit_reach_it():
    text = "A trans-\nformation of steel.\nShare | Log in\nhome\n"
    settings = {
        "edit": ["repair", "boilerplate", "c4_terminal_lines"],
        "score": [],
        "repair": {"join_broken_words": True},
        "boilerplate": {"buttons": False},
        "c4_lines": {"fewest_words": 1},
    }
    kept, _ = bessemer.refine(pa.table({"text": [text]}), {"clean": settings})
    assert kept.column("text").to_pylist() == ["A transformation of steel."]
    counts = ("repair_joined_words", "boilerplate_lines", "c4_lines_unterminated", "c4_lines_few_words")
    assert [kept.column(name)[0].as_py() for name in counts] == [1, 0, 2, 0]
