import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.evaluation.baselines import END, SYMBOLS, witten_bell, witten_bell_bits_per_byte

#: Few letters, so that contexts repeat.
documents = st.lists(st.text("abc", max_size=8).map(str.encode) | st.binary(max_size=4), min_size=1, max_size=5)


def reference(train, text, order):
    """The definition, by dictionaries: probability of each symbol of one document."""
    counts = defaultdict(Counter)
    for document in train:
        symbols = [END] * (order - 1) + [*document, END]
        for position in range(order - 1, len(symbols)):
            for length in range(order):
                counts[tuple(symbols[position - length : position])][symbols[position]] += 1

    def probability(symbol, context):
        shorter = probability(symbol, context[1:]) if context else 1 / SYMBOLS
        followers = counts[context]
        total, kinds = followers.total(), len(followers)
        return (followers[symbol] + kinds * shorter) / (total + kinds) if total else shorter

    symbols = [END] * (order - 1) + [*text, END]
    return [probability(symbols[at], tuple(symbols[at - order + 1 : at])) for at in range(order - 1, len(symbols))]


@settings(max_examples=60, deadline=None)
@given(train=documents, validation=documents, order=st.integers(1, 7))
def test_probabilities_are_those_of_the_definition(train, validation, order):
    *_, found = witten_bell(train, validation, order)
    assert found == pytest.approx([value for text in validation for value in reference(train, text, order)], rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(train=documents, context=st.text("abc", max_size=6).map(str.encode), order=st.integers(1, 6))
def test_the_probabilities_of_all_next_symbols_sum_to_one(train, context, order):
    continuations = [context + bytes([byte]) for byte in range(256)]
    *_, found = witten_bell(train, [*continuations, context], order)
    after_context = found.reshape(-1)[: 256 * (len(context) + 2)].reshape(256, len(context) + 2)[:, len(context)]
    assert after_context.sum() + found[-1] == pytest.approx(1)


def test_a_case_worked_by_hand():
    # order 1 on "aab": a 2, b 1, end 1 → total 4, 3 kinds; P(a) = (2 + 3/257) / 7
    # order 2: after a come a 1, b 1 → P(b | a) = (1 + 2 P(b)) / 4
    first, second = witten_bell([b"aab"], [b"ab"], 2)
    assert first[0] == pytest.approx((2 + 3 / 257) / 7)
    assert second[1] == pytest.approx((1 + 2 * (1 + 3 / 257) / 7) / 4)


def test_a_document_does_not_see_the_one_before_it():
    *_, alone = witten_bell([b"abab", b"cc"], [b"ab"], 4)
    *_, after_another = witten_bell([b"abab", b"cc"], [b"cab", b"ab"], 4)
    assert np.array_equal(after_another[-3:], alone)


def test_the_end_counts_in_the_bits_and_not_in_the_bytes():
    train, validation = [b"abcabc", b"ab"], [b"abc", b"b"]
    *_, probabilities = witten_bell(train, validation, 3)
    assert len(probabilities) == 6
    expected = sum(-math.log2(value) for value in probabilities) / 4
    assert witten_bell_bits_per_byte(train, validation, [3])[3] == pytest.approx(expected)


def test_orders_computed_together_are_those_computed_alone():
    train, validation = [b"the cat sat on the mat", b"the hat"], [b"that cat"]
    together = witten_bell_bits_per_byte(train, validation, [5, 2])
    assert list(together) == [2, 5]
    assert together[2] == witten_bell_bits_per_byte(train, validation, [2])[2]


def test_an_order_that_does_not_fit_64_bits_is_refused():
    with pytest.raises(ValueError, match="use 1 to 7"):
        next(witten_bell([b"a"], [b"a"], 8))
