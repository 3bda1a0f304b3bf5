"""What followed before: guesses from an answer's own text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.inference.scheduling.sequence import TokenSequence
from bessemer.inference.speculation.ngram import NGramProposer, Occurrences
from bessemer.inference.speculation.proposer import DraftLengthPolicy


def longest_match(tokens, lengths):
    """The same by looking through the whole text."""
    for length in lengths:
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[len(tokens) - length :]:
                return end
    return None


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 12), st.sampled_from([(3, 2), (4, 2), (1,)]))
def test_the_guess_follows_the_latest_occurrence_of_the_longest_n_gram(text, count, lengths):
    occurrences = Occurrences(lengths)
    for stop in range(1, len(text) + 1):  # as an answer grows
        tokens = text[:stop]
        end = longest_match(tokens, lengths)
        guess = occurrences.continuation(tokens, count)
        if end is None:
            assert guess.tokens == []
            continue
        written = list(tokens)
        for place in range(count):
            written.append(written[end + place])
        assert guess.tokens == written[stop:]
        match = guess.match
        assert tokens[end - match : end] == tokens[stop - match :]
        assert match == 16 or match == end or tokens[end - match - 1] != tokens[stop - match - 1]


def test_a_loop_is_guessed_beyond_the_end_of_the_text():
    assert Occurrences().continuation([9, 1, 2, 3, 1, 2, 3], 8).tokens == [1, 2, 3, 1, 2, 3, 1, 2]


def answer_of(tokens, identity=0, limit=1000):
    return SimpleNamespace(sequence=TokenSequence(identity, list(tokens), len(tokens), limit))


def proposer(most=4, answers=1):
    """One whose steps take as long with guesses as without."""
    made = NGramProposer(DraftLengthPolicy(most))
    made.measured(answers, 0, 1.0)
    for guesses in range(1, answers * most + 1):
        made.measured(answers, guesses, 1.0)
    return made


def test_the_first_step_is_without_guesses_and_is_timed():
    made, answer = NGramProposer(DraftLengthPolicy(4)), answer_of([1, 2, 3] * 6)
    assert list(made.propose([answer])[0].tokens) == []
    made.measured(1, 0, 1.0)
    assert list(made.propose([answer])[0].tokens) == [1, 2, 3, 1]


def test_no_guess_reaches_the_limit():
    # one more token is made behind the last guess
    assert len(proposer().propose([answer_of([1, 2, 3] * 6, limit=21)])[0].tokens) == 2


def grow(made, text, prompt):
    """Guesses of each step while an answer goes on token by token, whatever was guessed."""
    answer, guessed = answer_of(text[:prompt]), []
    for token in text[prompt:]:
        guessed.append(len(made.propose([answer])[0].tokens))
        answer.sequence.tokens.append(token)
        made.measured(1, 0, 1.0)
    return guessed


def test_guesses_that_never_come_true_end_without_a_step_spent_on_them():
    made = NGramProposer(DraftLengthPolicy(4))
    made.measured(1, 0, 1.0)
    made.measured(1, 1, 1.3)
    # the pair 1, 2 is always followed by something else
    text = [token for other in range(10, 60) for token in (1, 2, other)]
    guessed = grow(made, text, 6)
    assert sum(guessed[:12]) > 0 and sum(guessed[60:]) == 0


def test_guesses_begin_again_where_they_would_have_come_true():
    made = NGramProposer(DraftLengthPolicy(4))
    made.measured(1, 0, 1.0)
    made.measured(1, 1, 1.3)
    never = [token for other in range(10, 60) for token in (1, 2, other)]
    again = grow(made, never + [1, 2, 3, 4, 5] * 8, 6)[len(never) - 6 :]
    assert sum(again[:5]) == 0 and min(again[20:]) == 4


@pytest.mark.parametrize("count", [1, 3])
def test_an_answer_that_has_ended_leaves_nothing(count):
    made = proposer(answers=count)
    answers = [answer_of([1, 2, 3] * 6, identity) for identity in range(count)]
    made.propose(answers)
    for answer in answers:
        made.forget(answer)
    assert not made._texts
