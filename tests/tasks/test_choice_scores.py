import pytest

from bessemer.tasks.likelihood import choice_scores, greatest
from tests.tasks.written import FakeScore


def test_every_normalisation_is_the_one_worked_by_hand():
    # "né" has three bytes and two characters
    scores = [FakeScore([-1.0, -3.0, -2.0], [5, 6, 7]), FakeScore([-1.0, -4.0], [5, 8])]
    alone = [FakeScore([-7.0]), FakeScore([-4.5])]
    compared = choice_scores(scores, ["abcdef", "né"], alone)
    assert compared == {
        "raw": [-6.0, -5.0],
        "tokens": [-2.0, -2.5],
        "characters": [-1.0, -2.5],
        "bytes": [-1.0, pytest.approx(-5 / 3)],
        # the first token is common
        "distinct_tokens": [-2.5, -4.0],
        "unconditional": [1.0, -0.5],
    }


def test_a_choice_that_another_begins_with_keeps_its_last_token():
    assert choice_scores([FakeScore([-1.0, -2.0], [5, 6]), FakeScore([-1.0], [5])], ["a b", "a"])["distinct_tokens"] == [
        -1.5,
        -1.0,
    ]


def test_of_equal_values_the_first_is_the_greatest():
    assert greatest([-2.0, -1.0, -1.0]) == 1
