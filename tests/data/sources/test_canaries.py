"""Canaries: what is planted, and how often."""

import json
from collections import Counter

import pytest

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.data.corpus.reader import TRAIN
from bessemer.data.sources.canaries import (
    GROUP,
    NUMBER,
    copies,
    planted_canaries,
    read_canaries,
    settings_in,
    unseen_canaries,
)
from bessemer.data.sources.registry import CanariesSource, open_source
from bessemer.data.sources.source import Tally
from bessemer.data.stages.collect import Splitter


def read(settings, tmp_path):
    source = open_source(settings, tmp_path, tmp_path)
    return [document for unit in source.units() for _, document in source.read(unit, 0, Tally())]


def test_every_canary_stands_there_as_often_as_it_says(tmp_path):
    settings = CanariesSource(draws=3, repetitions=[1, 2, 8])
    documents = read(settings, tmp_path)
    counts = Counter(int(document.metadata[NUMBER]) for document in documents)
    canaries = planted_canaries(settings)
    assert {canary.number: canary.repetitions for canary in canaries} == counts
    # near ones have at least two copies, and every draw has one of each
    assert Counter((canary.kind, canary.repetitions) for canary in canaries) == dict.fromkeys(
        [("exact", 1), ("exact", 2), ("exact", 8), ("near", 2), ("near", 8)], 3
    )
    assert len({document.locator for document in documents}) == len(documents) == 3 * (1 + 2 + 8 + 2 + 8)


def test_of_a_near_one_a_tenth_of_the_words_is_replaced_in_all_but_the_first():
    settings = CanariesSource(words=40, replaced=0.1)
    canary = next(one for one in planted_canaries(settings) if one.kind == "near" and one.repetitions == 16)
    first, *others = copies(settings, canary)
    assert first == canary.text and len(others) == len(set(others)) == 15
    differences = [[a != b for a, b in zip(first.split(), other.split(), strict=True)] for other in others]
    assert {sum(changed) for changed in differences} == {4}
    # at places of their own, in the suffix as well
    assert len({tuple(changed) for changed in differences}) > 10 and any(any(changed[-8:]) for changed in differences)


def test_they_are_a_function_of_seed_and_number_and_unseen_ones_are_others():
    settings = CanariesSource()
    assert planted_canaries(settings) == planted_canaries(CanariesSource())
    texts = [one.text for one in [*planted_canaries(settings), *unseen_canaries(settings, 300)]]
    assert len(set(texts)) == len(texts)
    assert not {one.text for one in planted_canaries(CanariesSource(seed=1))} & set(texts)


def test_words_may_be_of_any_language(tmp_path):
    words = [
        "вода",
        "хлеб",
        "река",
        "水",
        "山",
        "火",
        "nœud",
        "été",
        "größe",
        "straße",
        "סוס",
        "בית",
        "ماء",
        "قلب",
        "पानी",
        "घर",
    ]
    (document, *_) = read(CanariesSource(vocabulary=words, words=12, suffix_words=4), tmp_path)
    assert set(document.text.split()) <= set(words)
    assert settings_in(document.metadata).vocabulary == words


def test_all_are_trained_on_whatever_share_is_held_out():
    assert {Splitter(share).split(GROUP, "") for share in (0.0, 0.05, 0.5, 0.8)} == {TRAIN}


def test_settings_travel_with_the_documents(tmp_path):
    settings = CanariesSource(seed=5, draws=2, repetitions=[1, 4], replaced=0)
    assert all(settings_in(document.metadata) == settings for document in read(settings, tmp_path))
    assert settings_in({"package": "json"}) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": 8, "suffix_words": 8}, "needs some before its suffix"),
        ({"vocabulary": ["a", "b"]}, "at least 16 different words"),
        ({"vocabulary": [*"abcdefghijklmnop", "two words"]}, "a word has no white space"),
        ({"repetitions": [1, 1]}, "name each number once"),
        ({"repetitions": [0]}, "greater than or equal to 1"),
    ],
)
def test_settings_that_give_none_are_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        CanariesSource.parse({"source": "canaries", **settings}, "collect")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_them_is_read_back(tmp_path):
    settings = CanariesSource(draws=2, repetitions=[1, 4])
    canaries = [*planted_canaries(settings), *unseen_canaries(settings, 3)]
    path = tmp_path / "canaries.jsonl"
    path.write_text("".join(json.dumps(one.record) + "\n" for one in canaries), encoding="utf-8")
    assert [one.record for one in read_canaries(path)] == [one.record for one in canaries]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", ArtefactError, ":1: is not JSON"),
        ('{"prefix": "a", "suffix": " "}', ArtefactError, ":1: a canary has a prefix and a suffix"),
        ('{"prefix": "a", "suffix": "b", "repetitions": "many"}', ArtefactError, ":1: repetitions"),
        ('{"prefix": "a", "suffix": "b", "repetitions": 1, "kind": "vague"}', ArtefactError, "not 'vague'"),
        ('{"prefix": "a", "suffix": "b", "repetitions": 1}', ConfigError, "holds no canaries with repetitions 0"),
        ('{"prefix": "a", "suffix": "b", "repetitions": 0}', ConfigError, "holds no planted ones"),
        ("", ConfigError, "holds no planted ones"),
        ("\x00\xff", ArtefactError, "not UTF-8"),
    ],
)
def test_what_is_no_file_of_them_is_one_line(tmp_path, content, error, message):
    path = tmp_path / "canaries.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(error) as raised:
        read_canaries(path)
    assert message in str(raised.value) and "\n" not in str(raised.value)
