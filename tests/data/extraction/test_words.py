"""The weights of words: what they learn, and which words of a block they see."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from bessemer.data.extraction.blocks import BUCKETS, MOST_HASHED, MOST_WORDS, word_scores
from bessemer.data.extraction.features import features
from bessemer.data.extraction.model import FEATURES
from bessemer.data.extraction.parsing import parse

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from extraction_training import buckets_of, fit_words


def parsed(source: str):
    data = np.frombuffer(source.encode(), np.uint8)
    return data, parse(data)


def buckets(source: str) -> list[list[int]]:
    return [[bucket for bucket in row if bucket >= 0] for row in buckets_of(*parsed(source)).tolist()]


def test_words_are_seen_whatever_their_case_and_digits():
    assert len(set(map(tuple, buckets("<p>Day 27<p>DAY 31<p><b>day</b>, 08!<p>d27ay")))) == 2


def test_a_word_its_place_and_its_pair_are_hashed():
    one, two, seven = buckets("<p>ore<p>ore coke<p>a b c d e f ore")
    # a word and its place; both of two words and their pair; the seventh word alone
    assert len(one) == 2 and len(two) == 5 and set(one) < set(two)
    assert len(seven) == 7 + 2 + 5 and seven[-1] == one[0]


def test_no_more_is_read_of_a_block_than_its_first_words():
    (row,) = buckets(f"<p>{'ore ' * 200}coke")
    assert len(row) == MOST_WORDS + 7 <= MOST_HASHED


def test_weights_part_what_is_main_text_from_what_is_not():
    source = "".join(f"<p>The furnace {n}a glows<p>Subscribe to letter {n}a" for n in "bcdefgh")
    rows = buckets_of(*parsed(source))
    weights = fit_words(rows, np.arange(len(rows)) % 2 == 0, np.ones(len(rows)))
    assert weights.shape == (BUCKETS,) and (weights == fit_words(rows, np.arange(len(rows)) % 2 == 0, np.ones(len(rows)))).all()
    page = parsed("<p>Subscribe to it<p>The furnace<p>?")
    scores = word_scores(*page, weights)
    assert scores[0] < 0 < scores[1] and scores[2] == 0
    row, _ = features(*page, weights)
    assert np.allclose(row[:, FEATURES.index("word_score_here")], scores)
    assert np.allclose(row[:, FEATURES.index("word_score_-1")], [0, scores[0], scores[1]])
