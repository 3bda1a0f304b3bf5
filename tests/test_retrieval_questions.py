"""The written questions that retrieval is measured by: each has its passage in the standard library, most without its words."""

from __future__ import annotations

import builtins
import importlib
import json
import re
import warnings
from pathlib import Path

import pytest

QUESTIONS = json.loads((Path(__file__).parents[1] / "benchmarks" / "retrieval_questions.json").read_text(encoding="utf-8"))
#: Words that say nothing of a question's matter.
PLAIN = {
    *(
        "a",
        "an",
        "the",
        "of",
        "in",
        "to",
        "and",
        "or",
        "how",
        "do",
        "i",
        "is",
        "it",
        "that",
        "with",
        "for",
        "by",
        "as",
        "my",
        "me",
    ),
    *(
        "this",
        "what",
        "which",
        "does",
        "on",
        "at",
        "one",
        "into",
        "be",
        "so",
        "are",
        "when",
        "from",
        "not",
        "no",
        "all",
        "each",
    ),
    *("any", "if", "can", "than", "them", "its", "there", "out", "up", "off", "use", "get", "set", "make", "made", "put"),
}


def named(name: str) -> object:
    """An object by its qualified name; `str.partition` is of the built-in type."""
    steps = name.split(".")
    for count in range(len(steps), 0, -1):
        try:
            found = importlib.import_module(".".join(steps[:count]))
        except ImportError:
            continue
        for step in steps[count:]:
            found = getattr(found, step)
        return found
    found = builtins
    for step in steps:
        found = getattr(found, step)
    return found


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower().replace("_", " ")))


@pytest.mark.parametrize("part", ["test", "calibration"])
def test_every_question_has_a_passage_with_text(part):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in QUESTIONS[part]["questions"]:
            assert all((named(name).__doc__ or "").strip() for name in row["passages"]), row


def test_there_are_a_hundred_and_most_have_no_word_of_their_passages_name():
    questions = QUESTIONS["test"]["questions"]
    assert len(questions) == 100 and len(QUESTIONS["test"]["near_misses"]) == 50
    without = [row for row in questions if not (words(row["question"]) - PLAIN) & words(" ".join(row["passages"]))]
    assert len(without) >= 50


def test_nothing_is_asked_twice():
    parts = [QUESTIONS["test"], QUESTIONS["calibration"]]
    asked = [row["question"] for part in parts for row in part["questions"]] + [
        each for part in parts for each in part["near_misses"]
    ]
    assert len(set(asked)) == len(asked)


def test_ways_of_searching_are_chosen_on_questions_about_other_objects():
    path = Path(__file__).parents[1] / "benchmarks" / "retrieval_development.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["questions"]
    measured = [row for part in ("test", "calibration") for row in QUESTIONS[part]["questions"]]
    assert not {name for row in rows for name in row["passages"]} & {name for row in measured for name in row["passages"]}
    assert len({row["question"] for row in rows}) == len(rows) >= 60
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(any((named(name).__doc__ or "").strip() for name in row["passages"]) for row in rows)
