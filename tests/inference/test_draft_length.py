"""How many guesses are worth checking."""

from __future__ import annotations

from itertools import pairwise, product
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.inference.scheduling.sequence import TokenSequence
from bessemer.inference.speculation.proposer import _LEAST_GAIN as LEAST_GAIN
from bessemer.inference.speculation.proposer import AcceptanceTracker, DraftLengthPolicy


def paced(cost, answers=1, most=4, adapt=True):
    """A pace that knows what every number of guesses takes."""
    policy = DraftLengthPolicy(most, adapt)
    policy.measured(answers, 0, cost(0))
    for guesses in range(1, answers * most + 1):
        policy.measured(answers, guesses, cost(guesses))
    return policy


chance = st.floats(0.4, 1.0)


def assert_best(found, chances, speed):
    """Of all lengths, `found` has the greatest speed; where that gains less than is asked for, there are no drafts."""
    best = max(speed(lengths) for lengths in product(*[range(len(each) + 1) for each in chances]))
    gain = best / speed([0] * len(chances))
    if gain > LEAST_GAIN * (1 + 1e-9):
        assert speed(found) == pytest.approx(best, rel=1e-9)
    elif gain < LEAST_GAIN * (1 - 1e-9):
        assert not any(found)


@given(st.lists(st.lists(chance, max_size=3), min_size=1, max_size=3), st.floats(0, 0.6))
def test_as_many_are_checked_as_make_most_tokens_a_second(chances, slope):
    def speed(lengths):
        tokens = len(chances)
        for each, length in zip(chances, lengths, strict=True):
            product_of = 1.0
            for one in each[:length]:
                product_of *= one
                tokens += product_of
        return tokens / (1 + slope * sum(lengths))

    assert_best(paced(lambda guesses: 1 + slope * guesses, len(chances), 3).lengths(chances), chances, speed)


@given(st.lists(st.lists(chance, max_size=3), min_size=1, max_size=3), st.floats(0, 0.6))
def test_where_nobody_waits_a_token_takes_least_time_in_the_mean(chances, slope):
    def quickness(lengths):
        times = 0.0
        for each, length in zip(chances, lengths, strict=True):
            tokens = product_of = 1.0
            for one in each[:length]:
                product_of *= one
                tokens += product_of
            times += 1 / tokens
        return len(chances) / times / (1 + slope * sum(lengths))

    policy = paced(lambda guesses: 1 + slope * guesses, len(chances), 3)
    assert_best(policy.lengths(chances, crowded=False), chances, quickness)


def test_one_answer_hurries_at_the_cost_of_all_only_where_others_wait_for_its_place():
    policy = paced(lambda guesses: 1 + 0.1 * guesses, 4, 8)
    chances = [[0.99] * 8, [], [], []]
    assert policy.lengths(chances, crowded=True) == [8, 0, 0, 0]
    assert policy.lengths(chances, crowded=False) == [0, 0, 0, 0]
    assert policy.lengths([[0.99] * 8] * 4, crowded=False) == [8] * 4


def test_where_a_row_costs_as_much_as_a_step_nothing_is_guessed():
    assert paced(lambda guesses: 1.0 + guesses).lengths([[0.99] * 4]) == [0]


def test_likely_guesses_of_one_answer_go_before_unlikely_ones_of_another():
    assert paced(lambda guesses: 1 + 0.2 * guesses, 2).lengths([[0.3] * 4, [0.99] * 4]) == [0, 4]


def test_making_guesses_is_part_of_their_price():
    policy = paced(lambda guesses: 1.0)
    assert policy.lengths([[0.6] * 4], seconds_a_token=0.0) == [4]
    assert policy.lengths([[0.6] * 4], seconds_a_token=0.3) == [1]
    assert policy.lengths([[0.6] * 4], seconds_a_token=0.7) == [0]


def test_a_price_that_was_too_high_is_asked_again_now_and_then():
    policy = paced(lambda guesses: 1 + 3.0 * guesses)
    asked = []
    for _ in range(2000):
        (length,) = policy.lengths([[0.9] * 4])
        asked.append(length)
        policy.measured(1, length, 1 + 3.0 * length)
    tries = [step for step, length in enumerate(asked) if length]
    waits = [after - before for before, after in pairwise(tries)]
    assert waits == sorted(waits) and waits[0] > 16 and waits[-1] > 400
    assert sum(asked) * 3 < 0.03 * len(asked)  # steps that were lost


def test_a_price_that_has_fallen_is_noticed():
    policy = paced(lambda guesses: 1 + 3.0 * guesses)
    lengths = []
    for _ in range(3000):
        (length,) = policy.lengths([[0.9] * 4])
        lengths.append(length)
        policy.measured(1, length, 1 + 0.05 * length)
    assert lengths[-100:].count(4) >= 99  # beside the step without that is timed again


def test_a_step_without_guesses_is_timed_again_while_all_have_them():
    policy = paced(lambda guesses: 1.0)
    lengths = []
    for _ in range(300):
        (length,) = policy.lengths([[0.9] * 4])
        lengths.append(length)
        policy.measured(1, length, 1.0)
    assert 2 <= lengths.count(0) <= 3


def test_one_slow_step_among_others_changes_nothing():
    policy = paced(lambda guesses: 1 + 0.1 * guesses)
    before = policy.lengths([[0.9] * 4])
    policy.measured(1, 0, 1.0)
    policy.measured(1, 4, 30.0)
    assert policy.lengths([[0.9] * 4]) == before == [4]


def test_without_adapting_every_guess_is_checked():
    assert DraftLengthPolicy(4, adapt=False).lengths([[0.0] * 4, [], [0.1] * 2]) == [4, 0, 2]


def answer(made=0, limit=100):
    return SimpleNamespace(sequence=TokenSequence(1, [0] * (10 + made), 10, limit))


def test_an_answer_rests_twice_as_long_after_every_miss():
    acceptance, rests = AcceptanceTracker(4), []
    for _ in range(8):
        rest = 0
        while not acceptance.chances(answer()):
            rest += 1
        rests.append(rest)
        acceptance.learn(answer(), 2, 0)
    assert rests == [0, 2, 4, 8, 16, 32, 64, 64]


def test_a_guess_that_came_true_ends_the_rests():
    acceptance = AcceptanceTracker(4)
    for _ in range(5):
        acceptance.learn(answer(), 2, 0)
    acceptance.learn(answer(), 2, 1)
    assert acceptance.chances(answer())


def test_chances_follow_what_came_true():
    acceptance = AcceptanceTracker(4)
    for _ in range(20):
        acceptance.learn(answer(), 4, 4)
    high = acceptance.chances(answer())[0]
    for _ in range(20):
        acceptance.learn(answer(), 4, 1)
    assert high > 0.95 and acceptance.chances(answer())[0] == pytest.approx(0.5, abs=0.1)


def test_guesses_stay_below_the_limit():
    assert len(AcceptanceTracker(4).chances(answer(limit=13))) == 2
