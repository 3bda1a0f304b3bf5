from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bessemer.data.deduplication.words import (
    ALONE,
    LIMIT,
    _folded,
    count_words,
    fold_table,
    hash_words,
    most_words,
    run_hash,
    run_hashes,
)
from bessemer.data.text.word_rules import WITHOUT_SPACES
from tests.data.deduplication import reference

FOLDINGS = ["similar", "words", "exact"]
#: Below the planes of private use, where everything is a word of its own to the kernel.
TEXTS = st.text(
    st.one_of(
        st.sampled_from("aB1.,- é\u0301\n"),
        st.characters(max_codepoint=0x3FFFF, exclude_categories=("Cs",)),
        st.sampled_from("中文カ ไทย๕İß\u00ad\u200b９ﬁ"),
    )
)


def hashed(text: str, folding: str, block: int | None = None) -> tuple[list[int], list[tuple[int, int]]]:
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    size = block or most_words(len(data))
    found, bounds, position = [], [], 0
    while position < len(data):
        hashes, places = np.empty(size, dtype=np.uint64), np.empty((size, 2), dtype=np.int64)
        count, position = hash_words(data, position, len(data), fold_table(folding), hashes, places, 0)
        found += hashes[:count].tolist()
        bounds += [tuple(place) for place in places[:count].tolist()]
    return found, bounds


def spelled(text: str) -> str:
    return " ".join(reference.words(text, "similar"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The CAT, sat!", "the cat sat"),
        ("Ça dépend: élève", "ca depend eleve"),
        ("3.14 and 1,000 and 1.2.3", "0 and 0 and 0 0"),
        ("v2.x a1b", "v0 x a0b"),
        ("soft\u00adhyphen", "softhyphen"),
        ("日本語 text", "日 本 語 text"),
        ("don't", "don t"),
        (" \n\t", ""),
    ],
)
def test_similar_folding_by_hand(text, expected):
    assert spelled(text) == expected
    assert hashed(text, "similar")[0] == hashed(expected.replace(" ", "\n"), "exact")[0]


@pytest.mark.parametrize("folding", FOLDINGS)
@settings(max_examples=150, deadline=None)
@example("1\u00ad.5 1.\u00ad5 １.５", "x")
@given(TEXTS, TEXTS)
def test_words_have_equal_hashes_exactly_when_the_reference_says_so(folding, left, right):
    text = left + " " + right
    expected = reference.words(text, folding)
    found, _ = hashed(text, folding)
    assert len(found) == len(expected)
    by_word = dict(zip(expected, found, strict=True))
    assert found == [by_word[word] for word in expected]
    assert len(set(found)) == len(by_word)


@pytest.mark.parametrize("folding", FOLDINGS)
@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(1, 5))
def test_reading_in_blocks_changes_nothing(folding, text, block):
    assert hashed(text, folding, block) == hashed(text, folding)


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_places_are_the_words_bytes(text):
    _, bounds = hashed(text, "exact")
    data = text.encode()
    assert [data[start:end].decode() for start, end in bounds] == reference.words(text, "exact")
    assert count_words(np.frombuffer(data, dtype=np.uint8), 0, len(data), fold_table("exact")) == len(bounds)


def test_a_character_cut_in_two_reads_nothing_beyond_the_end():
    data = np.frombuffer("a é".encode()[:-1] + b"\xff\xf0", dtype=np.uint8)
    hashes, places = np.empty(8, dtype=np.uint64), np.empty((0, 2), dtype=np.int64)
    assert hash_words(data, 0, len(data), fold_table("exact"), hashes, places, 0)[1] == len(data)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=30), st.integers(1, 12))
def test_rolling_hashes_are_those_of_the_runs_alone(values, length):
    hashes = np.array(values, dtype=np.uint64)
    runs = np.zeros(max(1, len(values)), dtype=np.uint64)
    total = run_hashes(hashes, len(hashes), length, runs)
    assert total == max(0, len(values) - length + 1)
    assert runs[:total].tolist() == [int(run_hash(hashes, start, length)) for start in range(total)]


def test_a_words_hash_is_fnv_over_code_points_and_mixed():
    """So that verdicts stay what they are from one version to the next."""
    mask = 2**64 - 1
    value = 0xCBF29CE484222325
    for character in "caté":
        value = (value ^ ord(character)) * 0x100000001B3 & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    assert hashed("caté", "exact")[0] == [value ^ value >> 31]


@pytest.mark.parametrize("folding", FOLDINGS)
def test_scripts_without_spaces_are_words_character_by_character_up_to_their_ends(folding):
    table = fold_table(folding)
    assert not table.flags.writeable
    ends = {code for first, last in WITHOUT_SPACES for code in (first, last) if code < LIMIT}
    inside = lambda code: any(first <= code <= last for first, last in WITHOUT_SPACES)  # noqa: E731
    for code in {*ends, *(code - 1 for code in ends), *(code + 1 for code in ends if code + 1 < LIMIT)}:
        folded = _folded(chr(code), folding)
        alone = inside(code) and folded > 0 and unicodedata.category(chr(code)) != "Nd"
        assert table[code] == folded + (ALONE if alone else 0), hex(code)
    # a digit of Thai, a separator among them, and an accent that is a word of its own nowhere
    assert not table[0x0E50] & ALONE and table[0x0E01] & ALONE and fold_table("similar")[0x3000] == 0
