from hypothesis import given
from hypothesis import strategies as st

from bessemer.posttraining.data.splitting import are_held_out, opening, opening_key, split_examples
from tests.posttraining.test_formats import said

ORDINARY = (
    "Write a short letter to the landlord of the house in Mill Lane and ask him kindly to mend the window of the kitchen "
    "before the winter comes, since it has been broken for three weeks"
)


def test_an_opening_is_the_system_message_and_what_the_user_says_first():
    chat = (said("system", "Be brief."), said("user", "Who?"), said("assistant", "Me."), said("user", "And?"))
    assert opening(chat) == opening(chat[:2]) == "Be brief.\nWho?"
    assert opening("The sky is") == "The sky is" and opening((said("assistant", "Hello."),)) == "Hello."


def test_openings_of_the_same_words_are_one():
    assert opening_key("What is 3 + 4?") == opening_key("what is  4 + 3") != opening_key("What is 3 + 5?")
    assert opening_key("?!") != opening_key("!")
    # every character of a script without spaces is a word
    assert opening_key("天气怎么样") == opening_key("天气怎么样？") != opening_key("天气好不好")


def test_near_copies_lie_on_one_side():
    copies = [ORDINARY, ORDINARY.replace("kindly", "friendly"), f"{ORDINARY}, please", ORDINARY.upper()]
    for seed in range(20):
        assert len(set(are_held_out(copies, 0.5, seed))) == 1


def test_questions_that_share_a_template_are_split():
    questions = [f"{ORDINARY} and answer the following question in one word: what is the number {n}?" for n in range(400)]
    held_out = sum(are_held_out(questions, 0.2, seed=1))
    assert 50 < held_out < 110


def test_a_side_depends_neither_on_the_order_nor_on_the_other_examples():
    questions = [f"Question {number}" for number in range(100)]
    sides = dict(zip(questions, are_held_out(questions, 0.3, seed=1), strict=True))
    assert dict(zip(questions[::-1], are_held_out(questions[::-1], 0.3, seed=1), strict=True)) == sides
    assert are_held_out(questions[:50], 0.3, seed=1) == [sides[question] for question in questions[:50]]


def test_a_greeting_that_most_conversations_begin_with_is_not_held_out():
    openings = ["Hi"] * 80 + [f"Question {number}" for number in range(20)]
    for seed in range(10):
        sides = are_held_out(openings, 0.1, seed)
        assert not any(sides[:80])
    assert any(any(are_held_out(openings, 0.1, seed)) for seed in range(10))


def test_a_share_of_nothing_holds_nothing_out():
    examples = ["a", "b", "c"]
    assert split_examples(examples, str, 0, seed=1) == (examples, [])
    assert split_examples([], str, 0.5, seed=1) == ([], [])


@given(st.lists(st.text(st.sampled_from("ab cé天.\ud800"), max_size=40), max_size=30), st.integers(0, 5))
def test_whatever_the_texts_equal_openings_are_together(openings, seed):
    sides = are_held_out(openings, 0.5, seed)
    assert len({(text, side) for text, side in zip(openings, sides, strict=True)}) == len(set(openings))
