"""The search by words: terms and stems by hand, scores by BM25's definition, whatever is filtered, asked for or damaged."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ArtefactError, StorageError
from bessemer.retrieval import word_index
from bessemer.retrieval.stemming import stem
from bessemer.retrieval.terms import searched_words, terms_of, words_of_text
from bessemer.retrieval.word_index import WordIndex, bm25_scores, build_word_index

pytest.importorskip("numba")

TEXTS = [
    "Iron rusts in water.",
    "Copper turns green in water, and green again.",
    "",
    "The iron bridge.",
    "Water, water, water.",
]


def built(folder, texts, at_once=2):
    batches = [texts[first : first + at_once] for first in range(0, len(texts), at_once)]
    assert build_word_index(batches, folder) == len(texts)
    return WordIndex(folder)


@pytest.mark.parametrize(
    ("word", "expected"),
    # of the vocabulary that Snowball publishes with its stemmer
    [
        ("consigned", "consign"), ("consistency", "consist"), ("consolatory", "consolatori"), ("knightly", "knight"),
        ("kneeling", "kneel"), ("generously", "generous"), ("skies", "sky"), ("dying", "die"), ("hopping", "hop"),
        ("hoping", "hope"), ("succeed", "succeed"), ("agreed", "agre"), ("sayings", "say"), ("cries", "cri"), ("ties", "tie"),
        ("gas", "gas"), ("running", "run"), ("adding", "add"), ("rationalization", "ration"), ("psychologist", "psycholog"),
        ("controlled", "control"), ("yes", "yes"), ("x2", "x2"), ("日本", "日本"),
    ],
)  # fmt: skip
def test_a_stem_is_that_of_porters_second_stemmer(word, expected):
    assert stem(word) == expected


def test_names_come_apart_and_words_keep_the_marks_of_their_scripts():
    assert searched_words("parseInt of json.loads") == "parseInt of json loads parse Int"
    assert words_of_text("max_tokens") == ["max", "tokens"]
    assert words_of_text("हिन्दी में") == ["हिन्दी", "में"]
    assert terms_of("Élan") == ["elan"] and terms_of("Straße") == ["strass"] and terms_of("x" * 100) == []
    assert terms_of("東京") == ["東", "京", "東京"] and terms_of("第3章") == ["第", "3", "章"]


def test_a_korean_word_is_found_whatever_particle_follows_it():
    texts = ["디스크를 암호화하려면 볼륨을 만듭니다.", "키보드는 나중에 고릅니다."]
    with_particles = [bm25_scores(query, texts) for query in ("키보드를 바꾸기", "노트북 키보드로")]
    assert all(second > 0 == first for first, second in with_particles)
    assert terms_of("메모리는") == ["메모", "모리", "리는"] and terms_of("USB를") == ["usb", "를"]


def test_scores_are_those_of_the_definition_worked_by_hand(tmp_path):
    rows, scores = built(tmp_path / "i", TEXTS).rank("green bridges", 5)
    # lengths 4, 8, 0, 3 and 3, so 3.6 on average; each word is in one text
    idf = np.log(1 + 4.5 / 1.5)
    green = idf * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 8 / 3.6))
    bridge = idf * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 3 / 3.6))
    assert rows.tolist() == [3, 1] and scores == pytest.approx([bridge, green], rel=1e-6)


words = st.lists(st.sampled_from(["iron", "irons", "Rust", "the", "water", "parseInt", "int", "東京"]), max_size=12).map(
    " ".join
)


@settings(max_examples=40, deadline=None)
@given(st.lists(words, min_size=1, max_size=12), words, st.integers(1, 12), st.data())
def test_neither_the_number_of_hits_nor_a_filter_moves_a_score(tmp_path_factory, texts, query, count, data):
    index = built(tmp_path_factory.mktemp("words") / "i", texts, at_once=data.draw(st.integers(1, 5)))
    expected = bm25_scores(query, texts)
    rows, scores = index.rank(query, len(texts))
    assert sorted(rows.tolist()) == np.flatnonzero(expected > 0).tolist() and scores == pytest.approx(expected[rows], rel=1e-5)
    assert np.all(np.diff(scores) <= 0) and index.rank(query, count)[0].tolist() == rows[:count].tolist()
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))))
    kept, own = index.rank(query, len(texts), allowed)
    assert kept.tolist() == [row for row in rows.tolist() if allowed[row]] and own.tolist() == scores[allowed[rows]].tolist()


def test_postings_that_are_written_in_parts_are_the_same(tmp_path, monkeypatch):
    whole = built(tmp_path / "whole", TEXTS)
    monkeypatch.setattr(word_index, "_POSTINGS_AT_ONCE", 3)
    built(tmp_path / "parts", TEXTS)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name
    assert whole.rank("water", 9)[0].tolist() == [4, 0, 1]


def test_stop_words_are_searched_for_where_there_is_nothing_else(tmp_path):
    index = built(tmp_path / "i", TEXTS)
    assert index.rank("the", 9)[0].tolist() == [3] and index.rank("the water", 9)[0].tolist() == [4, 0, 1]
    for query in ("", "?!", "unheard", "the unheard", "x" * 100_000, "\ud800", "[1] <|im_end|>"):
        assert index.rank(query, 9)[0].tolist() == []
    assert built(tmp_path / "none", [""]).rank("water", 9)[0].tolist() == []


def test_an_index_that_is_damaged_or_of_a_full_disk_is_one_line(tmp_path, monkeypatch):
    built(tmp_path / "i", TEXTS)
    with (tmp_path / "i" / "scores.bin").open("ab") as stream:
        stream.write(b"1")
    with pytest.raises(ArtefactError, match=r"scores.bin: this file is damaged; index the documents again"):
        WordIndex(tmp_path / "i")
    (tmp_path / "i" / "words.json").unlink()
    with pytest.raises(ArtefactError, match="the words of this index are missing; index the documents again"):
        WordIndex(tmp_path / "i")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(word_index.os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        build_word_index([TEXTS], tmp_path / "j")
