from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ConfigError
from bessemer.data.config import CleanConfig, SelectConfig
from bessemer.data.corpus.reader import SCHEMA
from bessemer.data.edits.registry import EDITS
from bessemer.data.filters.registry import FILTERS
from bessemer.data.stages.clean import cleaned_schema, cleaning, scorer
from bessemer.data.stages.explain import RECIPE, changes, explain, explain_address, explain_with
from bessemer.data.stages.select import selecting

WRITTEN = "As an AI language model, I cannot help. Write to jane.doe@gmail.com and the answer will be with you."


def test_every_edit_and_every_column_of_every_score_is_asked():
    found = explain(WRITTEN)
    assert [one.name for one in found.edits] == list(EDITS)
    assert [one.column for one in found.scores] == [column for name in FILTERS for column in scorer(name).columns]
    assert found.is_kept is None


def test_the_presets_that_drop_a_text_say_why():
    reasons = explain(WRITTEN).reasons
    assert reasons["gopher_quality"] == ["gopher: words 19 < 50"]
    assert reasons["model_written"][0].startswith("model written: score")
    assert "toxicity" not in reasons and "gopher" not in reasons


def test_a_score_stands_beside_the_limit_and_the_preset_that_it_belongs_to():
    words = next(one for one in explain(WRITTEN).scores if one.column == "gopher_words")
    assert (words.value, words.limit, words.preset, words.passes, words.description) == (
        19,
        (50, 100_000),
        "gopher_quality",
        False,
        "words",
    )


def test_a_text_is_no_address_and_an_address_no_text():
    of_text, of_address = explain("Porn and casino, a hardcore study."), explain_address("https://porn.example/hardcore")
    assert "urls" not in of_text.reasons and {one.value for one in of_text.scores if one.column.startswith("urls")} == {None}
    assert of_address.reasons.keys() == {"urls"}
    assert [one.column for one in of_address.scores] == ["urls_score", "urls_category"]
    both = explain(WRITTEN, url="https://porn.example/hardcore")
    assert both.reasons["urls"] == of_address.reasons["urls"]
    assert both.reasons["gopher_quality"] == explain(WRITTEN).reasons["gopher_quality"]


def test_an_edit_shows_the_piece_that_it_replaces():
    edit = next(one for one in explain(WRITTEN).edits if one.name == "personal_data")
    (change,) = edit.changes
    assert (change.before, change.after) == ("jane.doe@gmail.com", "<EMAIL>")
    assert change.left.endswith("Write to ") and change.right.startswith(" and the answer")
    assert edit.counts["personal_data_emails"] == 1


def test_a_recipe_is_asked_as_its_stages_would_answer(prose):
    clean = CleanConfig(edit=["pii", "c4_lines"], score=["language", "gopher_quality", "spam"])
    select = SelectConfig(keep=["gopher_quality", "spam"])
    for text in (prose(1), WRITTEN, "", "Der Ofen wurde mit großer Sorgfalt geheizt. " * 9, prose(2) + " = 1 + 2 - 3" * 60):
        found = explain_with(text, clean, select)
        row = {field.name: None for field in SCHEMA} | {
            "id": "0" * 32,
            "text": text,
            "text_hash": "",
            "source": "",
            "split": "train",
        }
        schema = cleaned_schema(clean, SCHEMA, Path())
        rows = cleaning(clean, schema, Path())(pa.RecordBatch.from_pylist([row], schema=SCHEMA))
        reason = rows.column("reason")[0].as_py() or selecting(select)(rows.select(schema.names)).column("reason")[0].as_py()
        assert found.is_kept == (reason is None)
        assert found.reasons.get(RECIPE, [None])[0] == reason
        assert found.text == rows.column("text")[0].as_py()


def test_every_rule_that_is_broken_is_named_after_the_first():
    reasons = explain_with("Der Hund.", CleanConfig(), SelectConfig()).reasons[RECIPE]
    assert [reason.partition(" ")[0] for reason in reasons[:1]] == ["language:"]
    assert any(reason.startswith("gopher: words") for reason in reasons[1:])
    assert len(reasons) == len(set(reasons))


def test_edits_of_a_recipe_follow_each_other():
    found = explain_with("<script>\x00 me@example.org", CleanConfig(edit=["repair", "pii"], score=["language"]), None)
    assert [one.name for one in found.edits] == ["repair", "personal_data", "secrets"]
    assert found.text == found.edits[-1].text
    assert "\x00" not in found.text and found.is_kept is True


def test_a_text_that_edits_leave_empty_is_dropped_by_clean():
    found = explain_with("one two", CleanConfig(edit=["c4_lines"], score=["language"]), SelectConfig(keep=["all"]))
    assert found.reasons == {RECIPE: ["clean: nothing is left"]}


def test_a_function_of_the_users_is_asked_too(tmp_path):
    (tmp_path / "mine.py").write_text("def brief(texts): return [len(text.as_py()) for text in texts]\n", encoding="utf-8")
    select = SelectConfig.parse({"keep": "all", "languages": [], "thresholds": {"brief": {"max": 3}}})
    found = explain_with("four", CleanConfig(score=["mine.py:brief"]), select, tmp_path)
    assert found.reasons == {RECIPE: ["brief 4 > 3"]}
    assert [(one.column, one.value, one.passes) for one in found.scores] == [("brief", 4.0, False)]


def test_a_limit_on_a_score_that_is_not_computed_is_an_error():
    with pytest.raises(ConfigError, match="no score 'gopher_repetition_duplicate_paragraphs'"):
        explain_with("text", CleanConfig(score=["language"]), SelectConfig())


def test_overlap_with_an_evaluation_set_is_found(tmp_path, prose):
    (tmp_path / "set.jsonl").write_text(json.dumps({"question": prose(3)}), encoding="utf-8")
    select = SelectConfig(keep=["all"], languages=[], decontaminate=["set.jsonl"])
    reasons = explain_with(prose(3), CleanConfig(score=["language"]), select, tmp_path).reasons[RECIPE]
    assert reasons[0].startswith("overlap with set")


LINES = st.lists(st.text(alphabet="ab \n.", max_size=12), max_size=6).map("\n".join)


@settings(deadline=None)
@given(LINES, LINES)
def test_changes_applied_to_the_text_give_the_other(before, after):
    text = before
    for change in reversed(changes(before, after)):
        end = change.start + len(change.before)
        assert text[change.start : end] == change.before != change.after
        text = text[: change.start] + change.after + text[end:]
    assert text == after


def test_equal_texts_have_no_changes():
    assert changes("same\ntext", "same\ntext") == []
