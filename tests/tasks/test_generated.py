import re

import pytest

from bessemer.tasks.generated_items import (
    LEVELS,
    Difficulty,
    arithmetic_items,
    count_words,
    is_held_out,
    needle_items,
    variable_tracking_items,
)
from bessemer.tasks.registry import find_tasks

GENERATORS = {
    "needle": lambda count, seed: needle_items(count, seed=seed, length=200, needles=3),
    "variable tracking": lambda count, seed: variable_tracking_items(count, seed=seed, length=200, chains=2),
    "arithmetic": lambda count, seed: arithmetic_items(count, seed=seed, difficulty=5),
}


@pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS.keys())
def test_items_depend_on_the_seed_alone_and_more_of_them_begin_with_the_same(generate):
    items = generate(8, 1)
    assert items == generate(8, 1) == generate(12, 1)[:8]
    assert items != generate(8, 2)
    assert len(set(items)) == 8


@pytest.mark.parametrize("length", [60, 500, 4_000])
def test_a_prompt_fills_its_length_and_no_more(length):
    for items in (needle_items(3, seed=0, length=length), variable_tracking_items(3, seed=0, length=length)):
        assert all(length - 14 <= count_words(item.prompt) <= length for item in items)


@pytest.mark.parametrize(("depth", "low", "high"), [(0.0, 0.0, 0.05), (0.5, 0.45, 0.55), (1.0, 0.9, 1.0)])
def test_the_needle_stands_at_its_depth(depth, low, high):
    for item in needle_items(5, seed=3, length=2_000, depth=depth, needles=4):
        text, question = item.prompt.split("\n\n")
        key = re.fullmatch(r"Question: What is the secret number of the (\w+ \w+)\?\nAnswer:", question)[1]
        statement = f"The secret number of the {key} is {item.answer}."
        assert text.count(statement) == 1 and text.count("The secret number") == 4
        assert low <= text.index(statement) / len(text) <= high


def test_needles_stand_anywhere_without_a_depth():
    places = [item.prompt.index(item.answer) / len(item.prompt) for item in needle_items(40, seed=0, length=500)]
    assert min(places) < 0.2 and max(places) > 0.8


def test_following_the_assignments_gives_the_value():
    """An interpreter of the statements, in the order in which they stand in the text."""
    for item in variable_tracking_items(20, seed=0, length=400, hops=5, chains=3):
        variables = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", item.prompt):
            variables[name] = source if source.isdecimal() else variables[source]
        asked = re.search(r"value of VAR (\w+)\?", item.prompt)[1]
        assert variables[asked] == item.answer
        assert len(variables) == 18 and len(set(variables.values())) == 3


def test_the_text_around_and_the_measure_may_be_the_users():
    sentences = ["Alpha beta.", "Gamma delta epsilon.", "Zeta."]
    (item,) = needle_items(1, seed=0, length=400, sentences=sentences, measure=len)
    text = re.sub(r"The secret number of the \w+ \w+ is \d+\. ?", "", item.prompt.split("\n\n")[0])
    assert 370 < len(item.prompt) <= 400
    around = " ".join(sentences * 20)
    assert text.strip() in around


@pytest.mark.parametrize("level", range(1, len(LEVELS) + 1))
def test_answers_are_what_python_calculates(level):
    items = arithmetic_items(100, seed=level, difficulty=level)
    difficulty = LEVELS[level - 1]
    for item in items:
        expression = item.prompt.removesuffix(" =")
        assert re.fullmatch(r"[\d+*() -]+", expression)
        assert str(eval(expression)) == item.answer
        numbers = re.findall(r"\d+", expression)
        assert len(numbers) == difficulty.terms and max(map(len, numbers)) <= difficulty.digits
    assert any("(" in item.prompt for item in items) == difficulty.parentheses


def test_what_a_task_skips_is_what_another_one_asks_and_settings_that_skip_nothing_stay():
    asked = {
        name: [question.context if isinstance(question.context, str) else question.context[-1]["content"] for question in found]
        for name in ("sums", "sums_check", "sums_held_out")
        for found in (find_tasks([name])[0].questions(),)
    }
    assert len(asked["sums_check"]) == 400 and not set(asked["sums_check"]) & set(asked["sums"])
    sides = {name: {frozenset(text.removesuffix(" =").split(" + ")) for text in texts} for name, texts in asked.items()}
    assert not sides["sums_check"] & sides["sums_held_out"]
    assert "skip" not in find_tasks(["sums"])[0].settings and find_tasks(["sums_check"])[0].settings["skip"] == 7_000


def test_what_is_held_out_is_never_trained_on_in_any_order_or_seed():
    tasks = {name: find_tasks([name])[0] for name in ("sums", "sums_held_out")}
    asked = {name: task.questions() for name, task in tasks.items()}
    sides = {
        name: {frozenset(question.context.removesuffix(" =").split(" + ")) for question in questions}
        for name, questions in asked.items()
    }
    assert not sides["sums"] & sides["sums_held_out"]
    assert (len(asked["sums"]), len(asked["sums_held_out"])) == (7_000, 500)
    two_digits = Difficulty(2, 2, "+")
    anew = [arithmetic_items(400, seed=9, difficulty=two_digits, part=part) for part in ("train", "held_out")]
    assert all(is_held_out(item.prompt.removesuffix(" =")) == held for held, items in enumerate(anew) for item in items)
    first = asked["sums"][0]
    assert tasks["sums"].reference(first) == str(eval(first.context.removesuffix(" =")))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: needle_items(1, seed=0, length=10), "a length of 10 does not hold the question and its statements; 20 does"),
        (lambda: needle_items(1, seed=0, length=100, depth=1.5), "a depth lies from 0 to 1"),
        (lambda: needle_items(1, seed=0, length=10_000, needles=101), "1 to 100 needles"),
        (lambda: needle_items(1, seed=0, length=100, sentences=["…"]), "are empty"),
        (lambda: variable_tracking_items(1, seed=0, length=100, chains=0), "1 chain"),
        (lambda: variable_tracking_items(1, seed=0, length=10), "does not hold"),
        (lambda: arithmetic_items(1, seed=0, difficulty=9), "levels of difficulty are 1 to 8"),
        (lambda: arithmetic_items(1, seed=0, difficulty=Difficulty(1, 2, "/")), r"operators of \+-\*"),
        (lambda: arithmetic_items(101, seed=0, difficulty=Difficulty(1, 2, "+")), "fewer than 101 different items"),
    ],
)
def test_what_cannot_be_made_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_all_items_that_there_are_can_be_made():
    assert len(arithmetic_items(100, seed=0, difficulty=Difficulty(1, 2, "+"))) == 100
