"""Tasks over items that are made: levels, lengths in a model's tokens, what is left out."""

import re

import pytest

from bessemer.core.errors import ConfigError
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.registry import read_task


def task_of(folder, options=None, **settings):
    path = folder / "task.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()), encoding="utf-8")
    return read_task(path, options)


def count_tokens(context):
    """A model that reads a begin token, one token for each four characters, and nine around each message of a conversation."""
    if isinstance(context, str):
        return 1 + -(-len(context) // 4)
    return 1 + sum(9 + -(-len(message["content"]) // 4) for message in context)


def test_arithmetic_shows_examples_of_the_same_level_that_are_no_items(tmp_path):
    task = task_of(tmp_path, kind="arithmetic", levels=[1, 3], items=40, shots=2)
    questions = task.questions()
    assert [question.level for question in questions[:4]] == [1, 3, 1, 3] and len(questions) == 80
    asked = {question.context.rpartition("\n")[2] for question in questions}
    for question in questions:
        *examples, last = question.context.split("\n")
        assert len(examples) == 2 and last.endswith("=")
        assert all(eval(example.replace("=", "==")) for example in examples)
        assert not asked & {example[: example.index("=") + 1] for example in examples}
        assert task.judge(question, [f" {eval(last[:-1])}\n"]).scores == {"accuracy": 1}
        assert task.judge(question, [f" {eval(last[:-1]) + 1}"]).scores == {"accuracy": 0}


def test_the_first_items_are_of_all_levels_and_are_the_same_with_a_limit(tmp_path):
    whole = task_of(tmp_path, kind="arithmetic", levels=[1, 2, 3], items=20, shots=1).questions()
    first = task_of(tmp_path, TaskOptions(limit=5), kind="arithmetic", levels=[1, 2, 3], items=20, shots=1).questions()
    assert first == whole[:5] and [question.level for question in first] == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("kind", ["needle", "variable_tracking"])
@pytest.mark.parametrize("chat", ["true", "false"])
def test_lengths_are_counted_by_the_model_with_all_that_it_reads(tmp_path, kind, chat):
    task = task_of(tmp_path, kind=kind, lengths=[200, 600], items=3, chat=chat, description="Read well.")
    task.fit_to_model(count_tokens, 1000)
    for question in task.questions():
        assert question.level - 25 <= count_tokens(question.context) <= question.level


def test_a_length_that_the_context_does_not_hold_is_left_out_and_said(tmp_path):
    task = task_of(tmp_path, kind="needle", lengths=[100, 300, 1000], items=2, max_tokens=30)
    left_out = task.fit_to_model(count_tokens, 330)
    questions = task.questions()
    assert [question.level for question in questions] == [100, 300, 100, 300]
    # the numbers of items, and so their samples, do not depend on what fits
    assert [question.item for question in questions] == [0, 1, 3, 4]
    assert left_out == ["left out, since the model's context is 330 tokens: length 1,000"]
    with pytest.raises(ConfigError, match="task task: no length fits: the shortest is 100 tokens"):
        task.fit_to_model(count_tokens, 120)


def test_a_needle_is_found_by_who_reads_the_text(tmp_path):
    task = task_of(tmp_path, kind="needle", lengths=[200], items=4, needles=2)
    for question in task.questions():
        key = re.search(r"secret number of the (\w+ \w+)\?", question.context)[1]
        number = re.search(rf"secret number of the {key} is (\d+)\.", question.context)[1]
        assert task.judge(question, [f" {number}."]).scores["accuracy"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "arithmetic", "levels": [9]}, "task.yaml:2"),
        ({"kind": "arithmetic", "levels": [1], "items": 5000}, "task task: .* has fewer than 5,000 different items"),
        ({"kind": "needle", "lengths": [8]}, "task.yaml:2"),
        ({"kind": "variable_tracking", "lengths": [32], "hops": 20}, "task task: a length of 32 does not hold the question"),
        ({"kind": "needle", "shots": 3}, "unknown key 'shots'"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        task_of(tmp_path, **settings).questions()
