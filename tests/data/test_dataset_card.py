from __future__ import annotations

import json

import pytest

from bessemer.data.config import CollectConfig, SelectConfig
from bessemer.data.corpus.dataset_card import StageRecord, dataset_card, lineage, write_card
from bessemer.data.edits.registry import EDITS
from bessemer.data.filters.registry import FILTERS, column_description
from bessemer.data.stages.clean import edit, scorer
from bessemer.data.stages.collect import collect
from bessemer.data.stages.select import select

HOSTILE = "a|b `c` <script>x</script> _d_ [e](http://f)\n# g"


def stage(documents_in: int, documents_out: int, **more) -> dict:
    figures = {"documents": documents_out, "bytes": 10 * documents_out}
    return {
        "documents_in": documents_in,
        "documents_out": documents_out,
        "bytes_in": 10 * documents_in,
        "bytes_out": 10 * documents_out,
        "by_source": {"web": figures},
        "by_language": {"en": figures},
        "by_license": {},
        "by_domain": {},
        "by_split": {"train": figures},
        "by_reason": {},
    } | more


def line(**last) -> list[StageRecord]:
    collected = StageRecord("collect", {"sources": [{"source": "files", "name": "web"}]}, stage(10, 10))
    chosen = {"keep": ["gopher"], "languages": ["en"]}
    return [collected, StageRecord("select", chosen, stage(10, 4, **last))]


def rows_of(card: str, title: str) -> list[list[str]]:
    """The cells of the table below a title."""
    below = card.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in below.splitlines() if row.startswith("|")][2:]


def test_the_front_matter_says_what_hubs_ask_for():
    card = dataset_card(line(by_license={"MIT": {"documents": 3, "bytes": 9}, "Custom": {"documents": 1, "bytes": 1}}))
    front = card.split("---")[1]
    assert "language:\n- en\n" in front
    assert "license:\n- mit\n- other\n" in front
    assert "- n<1K" in front
    assert "data_files: documents/*.parquet" in front


def test_sources_stand_before_and_after():
    assert rows_of(dataset_card(line()), "Sources") == [["web", "10", "4", "40 B"]]


def test_documents_without_a_licence_are_counted():
    card = dataset_card(line(by_license={"MIT": {"documents": 3, "bytes": 30}}))
    assert rows_of(card, "Licences") == [["MIT", "3", "30 B"], ["(not stated)", "1", ""]]


def test_reasons_stand_by_stage_with_the_most_frequent_first():
    reasons = {"language": {"documents": 1, "bytes": 1}, "gopher: words": {"documents": 5, "bytes": 2}}
    rows = rows_of(dataset_card(line(by_reason=reasons)), "What was dropped")
    assert [row[1] for row in rows] == ["gopher: words", "language"]


def test_what_authors_object_to_is_said():
    card = dataset_card(line(by_opt_out={"noai": {"documents": 2, "bytes": 2}}))
    assert "Authors object to a use of 2 of these documents**: noai (2)" in card
    assert "object" not in dataset_card(line())


def test_edits_and_thresholds_have_their_meaning():
    limit = {"lowest": 50, "highest": 100_000, "outside": 6, "alone": 2}
    counted = {"personal_data_emails": {"documents": 2, "total": 3}, "secrets_keys": {"documents": 0, "total": 0}}
    card = dataset_card(line(thresholds={"gopher_words": limit}, counted=counted))
    assert rows_of(card, "Thresholds") == [["`gopher_words`", "words", "50", "100000", "6", "2"]]
    assert rows_of(card, "What was edited") == [["e-mail addresses found", "3", "2"]]


@pytest.mark.parametrize("column", ["by_source", "by_domain", "by_license", "by_reason", "by_opt_out"])
def test_texts_from_outside_mean_nothing_in_markdown(column):
    found = {HOSTILE: {"documents": 4, "bytes": 40}}
    collected, selected = line(**{column: found})
    collected.metrics[column] = found
    card = dataset_card([collected, selected])
    assert "<script>" not in card.replace("\\<script", "")
    assert r"a\|b" in card
    assert "\n# g" not in card
    assert "](http" not in card.replace("\\]", "")


def test_the_line_is_found_from_manifest_to_manifest(tmp_path):
    for name, key, inputs in (("collect", "collect-1", {}), ("clean", "clean-2", {"documents": {"key": "collect-1"}})):
        (tmp_path / key / "documents").mkdir(parents=True)
        manifest = {"stage": name, "settings": {}, "metrics": {"n": name}, "inputs": inputs}
        (tmp_path / key / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert [record.name for record in lineage(tmp_path / "clean-2" / "documents")] == ["collect", "clean"]
    assert lineage(tmp_path / "other" / "documents") == []


def test_select_leaves_a_card_beside_its_documents(tmp_path, prose):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"id": n, "text": prose(n)}) + "\n" for n in range(20)), encoding="utf-8"
    )
    (tmp_path / "collected").mkdir()
    (tmp_path / "selected").mkdir()
    config = CollectConfig.parse([{"source": "files", "paths": "a.jsonl"}])
    collect(config, tmp_path / "collected", cache=tmp_path / "cache", folder=tmp_path)
    settings = SelectConfig(keep=["all"], languages=[])
    metrics = select(settings, tmp_path / "collected" / "documents", tmp_path / "selected")
    card = (tmp_path / "selected" / "README.md").read_text(encoding="utf-8")
    assert "# A corpus of 20 documents" in card
    assert card == dataset_card([StageRecord("select", settings.output_settings(), metrics)])


def test_writing_a_card_twice_gives_the_same_bytes(tmp_path):
    write_card(tmp_path, line())
    first = (tmp_path / "README.md").read_bytes()
    write_card(tmp_path, line())
    assert (tmp_path / "README.md").read_bytes() == first


def test_every_column_of_ours_has_a_meaning():
    columns = [column for name in FILTERS for column in scorer(name).columns]
    columns += [column for name in EDITS for column in edit(name).columns]
    assert [column for column in columns if not column_description(column)] == []
    assert column_description("gopher_repetition_top_3_gram") == "share of characters in the most frequent run of 3 words"
    assert column_description("brief") == column_description("mine_own_score") == ""
