"""A user's own lists, classifiers, models and functions in the stage `clean`."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from bessemer.cli.main import main
from bessemer.core.errors import ConfigError
from bessemer.data.config import CleanConfig, CollectConfig
from bessemer.data.corpus.reader import document_schema, iterate_documents
from bessemer.data.edits.registry import EDITS
from bessemer.data.filters.registry import FILTERS
from bessemer.data.sources.io.fetch import Clock
from bessemer.data.stages.clean import FAILED, _UserCall, clean, edit, outside_files, scorer
from bessemer.data.stages.collect import collect
from bessemer.data.text.texts import Texts


@pytest.fixture
def documents(tmp_path):
    records = [
        {"id": 1, "text": "Steel is made in a furnace, and the furnace is hot.", "url": "https://good.example/steel"},
        {"id": 2, "text": "Buy cheap steel now!!! Click here to win a prize.", "url": "https://www.casino.example/win"},
        {"id": 3, "text": "Nothing of it."},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (tmp_path / "collected").mkdir()
    config = CollectConfig.parse([{"source": "files", "paths": "a.jsonl"}])
    collect(config, tmp_path / "collected", cache=tmp_path, folder=tmp_path)
    return tmp_path / "collected" / "documents"


@pytest.mark.parametrize("name", list(FILTERS))
def test_every_score_gives_the_columns_that_it_names(name):
    one = scorer(name)
    found = one.function(Texts.of(["A text.", "", "https://casino.example/poker"]))
    assert {column: values.type for column, values in found.items()} == dict(one.columns)
    assert all(len(values) == 3 for values in found.values())


@pytest.mark.parametrize("name", list(EDITS))
def test_every_edit_gives_texts_and_the_columns_that_it_names(name):
    one = edit(name)
    texts, counts = one.function(Texts.of(["A text.", "", "Write to a.b@firm.org, or to c@firm.org."]))
    assert len(texts) == 3
    assert {column: values.type for column, values in counts.items()} == dict(one.columns)


def test_addresses_are_scored_by_the_documents_url(tmp_path, documents):
    (tmp_path / "bad.txt").write_text("casino.example\n", encoding="utf-8")
    clean(CleanConfig.parse({"score": ["urls"], "url_lists": ["bad.txt"]}), documents, tmp_path / "out", folder=tmp_path)
    rows = {dict(row)["text"][:5]: row for batch in iterate_documents(tmp_path / "out/documents") for row in batch.to_pylist()}
    assert rows["Buy c"]["urls_score_bad"] == 1
    assert rows["Steel"]["urls_score_bad"] == rows["Nothi"]["urls_score_bad"] == 0


def test_a_trained_classifier_and_a_model_of_words_score_documents(tmp_path, documents, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = [f"The furnace number {n} is heated with care, and the masters know how." for n in range(80)]
    bad = [f"Win {n} prizes now, click here, buy cheap, best offer of all!!!" for n in range(80)]
    for name, texts in (("good", good), ("bad", bad)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "texts.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
        )
    for arguments in (["train-classifier", "good", "bad", "judge", "--name", "steel"], ["train-words", "good", "words"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0, capsys.readouterr().err
    assert "classifiers=judge" in capsys.readouterr().out
    config = CleanConfig.parse({"score": [], "classifiers": ["judge"], "perplexity": "words"})
    clean(config, documents, tmp_path / "out", folder=tmp_path)
    assert {"classifier_steel", "perplexity_bits_per_byte"} <= set(document_schema(tmp_path / "out/documents").names)
    rows = {row["text"][:5]: row for batch in iterate_documents(tmp_path / "out/documents") for row in batch.to_pylist()}
    assert rows["Steel"]["classifier_steel"] > rows["Buy c"]["classifier_steel"]
    assert rows["Steel"]["perplexity_bits_per_byte"] < rows["Buy c"]["perplexity_bits_per_byte"]
    before = outside_files(config, tmp_path)
    (tmp_path / "judge" / "classifier.json").write_text("{}", encoding="utf-8")
    assert outside_files(config, tmp_path) != before


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file or folder .*none"):
        outside_files(CleanConfig.parse({"classifiers": ["none"]}), tmp_path)


class Users:
    """A user's function that fails on some texts, and counts how often it is called."""

    def __init__(self, fails):
        self.fails, self.calls, self.waits = fails, 0, []
        self.call = _UserCall(self, "mine.py:f", "score", pa.float64(), lambda scores: scores, Clock(self.waits.append))

    def __call__(self, texts):
        self.calls += 1
        for text in texts.to_pylist():
            if (error := self.fails(text)) is not None:
                raise error
        return [float(text) for text in texts.to_pylist()]


def test_a_text_on_which_a_users_function_fails_is_found_by_halves():
    users = Users(lambda text: ValueError(f"not {text}") if text == "700" else None)
    scores, failed = users.call(pa.array(map(str, range(1024))))
    assert scores.to_pylist() == [None if n == 700 else float(n) for n in range(1024)]
    reasons = failed[FAILED].to_pylist()
    assert (reasons.pop(700), set(reasons)) == ("clean: mine.py:f: it failed: ValueError: not …", {None})
    assert users.calls == 21
    assert users.waits == []


def test_a_users_function_that_a_network_fails_is_asked_again_after_growing_waits():
    errors = [ConnectionError("no route")] * 2
    users = Users(lambda text: errors.pop() if errors else None)
    scores, failed = users.call(pa.array(["1", "2"]))
    assert (scores.to_pylist(), failed, users.waits) == ([1.0, 2.0], {}, [1.0, 2.0])


def test_a_users_function_that_fails_on_each_of_the_first_documents_is_taken_for_wrong():
    users = Users(lambda text: ValueError(text))
    message = "^mine.py:f: it failed: ValueError: 99; and so it did on each of the first 100 documents$"
    with pytest.raises(ConfigError, match=message):
        users.call(pa.array(map(str, range(1000))))


def test_no_texts_are_no_failure():
    scores, failed = Users(lambda text: None).call(pa.array([], pa.string()))
    assert (scores.to_pylist(), failed) == ([], {})
