"""Scores of published picture tasks: cases worked by hand, and the functions of lmms-eval where it is installed."""

import __future__

import ast
import random
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bessemer.core.statistics import mean_estimate
from bessemer.tasks.picture_scores import (
    anls,
    answers_right,
    chosen_option,
    detection_scores,
    edit_distance,
    relaxed_match,
    says_yes,
)

OPTIONS = {"A": "a pear", "B": "a plum", "C": "a hat", "D": "a cat"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("B.", "B"),
        ("The answer is D.", "D"),
        ("A or B? I say (A), no, (B)", "B"),
        ("C. a hat", "C"),
        ("A then B then A then", "A"),
        # the text of an option counts in answers of more than five words alone
        ("what is shown here is surely a plum", "B"),
        ("a plum", None),
        ("it is not a pear, it must be a hat", "C"),
        ("", None),
        ("no idea", None),
        # a letter before a space is found within a word too, as there
        ("DNA strands", "A"),
    ],
)
def test_an_option_is_read_as_mmmu_reads_it(text, letter):
    assert chosen_option(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "references", "is_right"),
    [
        ("12", ["12"], True),
        ("The answer is 12.", ["12.00"], True),
        ("so x = 1,200", ["1200"], True),
        ("3.14159", ["3.14"], True),
        ("3.15", ["3.14"], False),
        ("It is the Treaty of Paris", ["treaty of paris"], True),
        ("paris", ["treaty of paris"], False),
        ("twelve", ["12", "twelve"], True),
        # behind a word that announces it the end of the line alone is the answer
        ("12 pears and so 13", ["12"], False),
        # a single letter counts as a word of its own
        ("vector x", ["x"], True),
        ("xylophone", ["y"], False),
        ("1.2e3 metres", ["1200"], True),
    ],
)
def test_an_open_answer_is_judged_as_mmmu_judges_it(text, references, is_right):
    assert answers_right(text, references) is is_right


@pytest.mark.parametrize(
    ("text", "reference", "is_right"),
    [
        ("14.7", "14", True),  # 5 % exactly
        ("14.71", "14", False),
        ("-0.5", "0.5", False),
        ("5%", "0.05", True),
        ("5.2%", "5%", True),
        ("5", "5%", False),
        ("YES", "Yes", True),
        ("Yes.", "Yes", False),
        ("0", "0", True),
        ("0.0", "0", False),  # nothing is within a share of 0
        ("1,400", "1400", False),
    ],
)
def test_a_number_of_a_chart_may_be_five_per_cent_off(text, reference, is_right):
    assert relaxed_match(text, reference) is is_right


@pytest.mark.parametrize(
    ("text", "references", "score"),
    [
        ("Denver", ["denver"], 1.0),
        ("Denver Bronco", ["Denver Broncos", "Broncos"], 13 / 14),
        ("12/15/89", ["12/15/88"], 7 / 8),
        ("abcd", ["abxy"], 0.5),  # at the threshold it counts
        ("abc", ["axy"], 0.0),
        ("  two   words ", ["two words"], 1.0),
        ("", ["x"], 0.0),
    ],
)
def test_a_page_is_scored_by_edits(text, references, score):
    assert anls(text, references) == pytest.approx(score)


def test_edits_are_counted():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("flaw", "lawn"), ("a", "a"))] == [3, 3, 2, 0]


@pytest.mark.parametrize(
    ("text", "is_yes"),
    [
        ("Yes", True),
        ("yes.", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not. Yes", False),
        ("Yes, there is. No doubt", True),
        ("nothing", True),
    ],
)
def test_an_answer_is_a_yes_without_a_word_of_no(text, is_yes):
    assert says_yes(text) is is_yes


def of_means(answers, labels):
    """The figures as an evaluation takes them: the mean of each score, by its weights."""
    found = {}
    for yes, there in zip(answers, labels, strict=True):
        scores, weights = detection_scores([yes], there)
        for name, score in scores.items():
            found.setdefault(name, []).extend([score] * weights.get(name, 1))
    return {name: mean_estimate(values, list(range(len(values)))).mean for name, values in found.items()}


def test_means_of_the_scores_are_precision_recall_and_f1():
    answers, labels = [True, True, True, False, False, False, False], [True, True, False, True, False, False, True]
    # TP 2, FP 1, FN 2, TN 2
    wanted = {"accuracy": 4 / 7, "yes_ratio": 3 / 7, "precision": 2 / 3, "recall": 1 / 2, "f1": 4 / 7}
    assert of_means(answers, labels) == pytest.approx(wanted)
    assert "precision" not in of_means([False], [True]) and "f1" not in of_means([False], [False])


# -- beside lmms-eval, whose functions are those of the data sets' own evaluations


def peer(file, **names):
    """The functions and constants of a file of lmms-eval, without what the file imports."""
    spec = find_spec("lmms_eval")
    if spec is None:
        pytest.skip("lmms-eval is not installed")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        function.decorator_list = []
    found = dict(names)
    # the names in their annotations are not there
    exec(compile(ast.Module(functions, []), file, "exec", flags=__future__.annotations.compiler_flag), found)
    return found


WORDS = [
    "A",
    "(B)",
    "C.",
    "B,",
    "a pear",
    "a plum",
    "hat",
    "is",
    "so",
    "=",
    "answer",
    "12",
    "1,200",
    "3.14",
    "-5",
    "1e3",
    "\n",
    ".",
]


def drawn_texts(count):
    draw = random.Random(7)
    return [" ".join(draw.choices([*WORDS, "\n", "."], k=draw.randint(0, 9))) for _ in range(count)]


def test_options_are_those_that_lmms_eval_reads():
    class Guess:
        choice = staticmethod(lambda letters: None)

    theirs = peer("tasks/_task_utils/mmmu_mcq_utils.py", random=Guess, np=np, re=re)["parse_mmmu_multi_choice_response"]
    for text in drawn_texts(3000):
        assert chosen_option(text, OPTIONS) == theirs(text, list(OPTIONS), OPTIONS), text


def test_open_answers_are_judged_as_lmms_eval_does():
    theirs = peer("tasks/mmmu/utils.py", re=re)
    for number, text in enumerate(drawn_texts(3000)):
        reference = ["12", "1200", "a plum", "3.14", "x", "-5", "b"][number % 7]
        assert answers_right(text, [reference]) is theirs["eval_open"](reference, theirs["parse_open_response"](text)), text


def test_charts_and_pages_are_scored_as_lmms_eval_does():
    relaxed = peer("tasks/chartqa/utils.py")["relaxed_correctness"]
    theirs = peer("api/metrics.py")["anls"]
    draw = random.Random(3)
    numbers = ["0", "5%", "14", "14.7", "-3", "yes", "Yes", "1e2", "nan", ""]
    for text, reference in ((a, b) for a in numbers for b in numbers):
        assert relaxed_match(text, reference) is relaxed(text, reference), (text, reference)
    for _ in range(1000):
        text, *references = ["".join(draw.choices("abB  ß1", k=draw.randint(0, 8))).strip() for _ in range(3)]
        assert anls(text, references) == pytest.approx(theirs(references, [text])["anls"]), (text, references)


def test_f1_is_that_of_lmms_eval():
    theirs = peer("tasks/pope/utils.py")
    draw = random.Random(5)
    answers, labels = ([draw.random() < share for _ in range(500)] for share in (0.6, 0.5))
    ours = of_means(answers, labels)
    said = [
        {"prediction": "yes" if yes else "no", "ground_truth": "yes" if there else "no", "score": float(yes == there)}
        for yes, there in zip(answers, labels, strict=True)
    ]
    for name, function in [("accuracy", "accuracy"), ("precision", "precision"), ("recall", "recall"), ("f1", "f1_score")]:
        assert ours[name] == pytest.approx(theirs[f"pope_aggregate_{function}"](said)), name
