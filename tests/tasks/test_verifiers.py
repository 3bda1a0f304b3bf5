"""Each verifier beside a table of right and wrong answers."""

from fractions import Fraction

import pytest

from bessemer.core.errors import ConfigError
from bessemer.tasks.generate import verified_samples
from bessemer.tasks.verifiers import Contains, Exact, Numeric, Overlap, Pattern, answered_number, numbers_in, word_f1

EXACT = [
    ("Paris", ["Paris"], True),
    ("  the\n PARIS. ", ["Paris"], True),
    ("Saint-Étienne", ["saint-étienne"], True),
    ("Scorpio", ["Virgo", "Scorpio"], True),
    ("Paris, France", ["Paris"], False),
    ("Pari", ["Paris"], False),
    ("", ["Paris"], False),
    ("...", ["Paris"], False),
    # a name that normalisation would leave nothing of
    ("The The", ["The The"], True),
    ("", ["The The"], False),
    ("C++", ["C"], True),
    # a letter that is an article, too
    ("A.", ["A"], True),
    ("(A)", ["A"], True),
    ("**A**", ["A"], True),
    ("a", ["A"], True),
    ("B", ["A"], False),
    ("the", ["A"], False),
]
#: The same with nothing ignored but white space.
STRICT = [("a  cat", ["a cat"], True), ("A cat", ["a cat"], False), ("cat", ["a cat"], False), ("C++", ["C"], False)]
#: The same with only punctuation ignored.
CASED = [("(A)", ["A"], True), ("a", ["A"], False), ("The A", ["A"], False)]
CONTAINS = [
    ("I think it is Scorpio, or not.", ["Scorpio"], True),
    ("the Beatles!", ["Beatles", "Stones"], True),
    ("scorpions", ["Scorpio"], False),
    ("", ["Scorpio"], False),
    ("nothing", ["Scorpio"], False),
    ("it was C++ then", ["the C++"], True),
    ("The answer is A.", ["A"], True),
    ("Answer: **A**", ["A"], True),
    ("Answer: (a)", ["a"], True),
    ("the answer is a", ["A"], True),
    ("A is right", ["a"], True),
    ("It is a clear B", ["A"], False),
    ("It is a “clear” B", ["A"], False),
    ("It is a clear B", ["B"], True),
    ("I heard The The play", ["The The"], True),
    ("I heard the band", ["The The"], False),
    ("Say an apple", ["an"], True),
]
NUMERIC = [
    ("145", ["145"], True),
    (" The answer is 1,234.50 dollars.", ["1234.5"], True),
    ("First 3, then 4.", ["4"], True),
    ("First 3, then 4.", ["3"], False),
    ("#### 12\nIs 13 wrong?", ["12"], True),
    ("#### none, but 7", ["7"], True),
    ("so 1/2 of it", ["0.5"], True),
    ("1 1/2 cups", ["1.5"], True),
    ("-7", ["-7"], True),
    ("−7", ["-7"], True),
    ("7", ["-7"], False),
    ("10-5", ["5"], True),
    ("$-3", ["-3"], True),
    ("-$3", ["-3"], True),
    ("1e3", ["1000"], True),
    ("0.3333", ["1/3"], False),
    ("3.0", ["3"], True),
    ("no number", ["3"], False),
    ("", ["0"], False),
    ("1/0", ["0"], True),
    # a sign with a space behind it is one where a value begins, else a dash or a bullet
    ("Answer:\n- 5", ["5"], True),
    ("Answer:\n- 5", ["-5"], False),
    ("The answer - 42", ["42"], True),
    ("10 - 5", ["5"], True),
    ("5 – 7", ["7"], True),
    ("- 5", ["-5"], True),
    ("x = - 5", ["-5"], True),
    ("so x ≈ −\u00a05", ["-5"], True),
    ("The answer is - 42", ["-42"], True),
    ("**Answer:** - 42", ["-42"], True),
    ("(- 5)", ["-5"], True),
    ("So: #### - 5\nDone.", ["-5"], True),
    ("–7", ["-7"], True),
    ("–7", ["7"], False),
    ("5–7", ["7"], True),
    # a mixed number stands in one line
    ("Question 4\n\n1/2", ["1/2"], True),
    ("3\n1/2", ["1/2"], True),
    (r"\boxed{\frac{1}{2}}", ["1/2"], True),
    (r"\boxed{\frac{1}{2}}", ["2"], False),
    (r"$-\dfrac{3}{4}$", ["-0.75"], True),
    (r"\frac{-1}{2}", [r"-\frac{1}{2}"], True),
    (r"\tfrac12", ["0.5"], True),
    (r"2\frac{1}{2}", ["2.5"], True),
    (r"\frac{1{,}000}{4}", ["250"], True),
    (r"\boxed{-5}", ["-5"], True),
    (r"\boxed{7}-5", ["5"], True),
    ("1{,}234", ["1234"], True),
    (r"1,\!234\,567", ["1234567"], True),
    (r"-\$5", ["-5"], True),
]
PATTERN = [
    ("Answer: B", ["B"], True),
    ("Answer: B. No, answer: (c)", ["C"], True),
    ("Answer: B. No, answer: (c)", ["B"], False),
    ("B", ["B"], False),
    ("answer: ", ["B"], False),
    ("Answer: a", ["A"], True),
    ("Answer: (A)", ["a"], True),
]


@pytest.mark.parametrize(
    ("verifier", "table"),
    [
        (Exact(), EXACT),
        (Exact(ignore_case=False, ignore_punctuation=False, ignore_articles=False), STRICT),
        (Exact(ignore_case=False), CASED),
        (Contains(), CONTAINS),
        (Numeric(), NUMERIC),
        (Pattern(pattern=r"(?i)answer:\s*\(?([a-d])\b"), PATTERN),
    ],
    ids=["exact", "strict", "cased", "contains", "numeric", "regex"],
)
def test_answers_are_judged_as_the_table_says(verifier, table):
    judged = [(text, references, verifier.verify(text, references)) for text, references, _ in table]
    assert judged == table


def test_a_tolerance_is_a_share_of_the_reference():
    near = Numeric(relative_tolerance=0.01)
    assert near.verify("99", ["100"]) and near.verify("-101", ["-100"])
    assert not near.verify("98.9", ["100"]) and not near.verify("0.001", ["0"])


def test_the_first_number_can_be_picked():
    assert Numeric(pick="first").verify("3, then 4", ["3"])


def test_numbers_are_exact():
    text = "0.1 1,000,000; 2/4; 3 1/4 -5 6-7 .5 1,23 2.5e-1 12,345.6"
    expected = ["1/10", "1000000", "1/2", "13/4", "-5", "6", "7", "1/2", "1", "23", "1/4", "61728/5"]
    assert numbers_in(text) == list(map(Fraction, expected))
    assert answered_number("none", "last") is None


@pytest.mark.parametrize(
    "degenerate", ["9" * 4301, "0." + "3" * 5000, "1/" + "7" * 4301, "1 1/" + "7" * 4301, "-" + "1" * 1000]
)
def test_a_number_without_end_is_no_answer_and_no_reference(degenerate):
    numeric = Numeric()
    assert numeric.answer(degenerate) is None and numbers_in(f"4, {degenerate}") == [4]
    assert numeric.answer(f"It is 4. {degenerate}") is None and Numeric(pick="first").answer(f"4, {degenerate}") == 4
    assert numeric.refusal(degenerate) == "is not a number"


def test_every_number_that_is_read_can_be_written():
    assert len(str(Numeric().answer("9" * 995 + "e999"))) == 995 + 999


def test_of_texts_that_hold_a_letter_equal_ones_are_counted_together():
    contains = Contains()
    answers = [contains.answer(text) for text in ("It is B.", "It is A.", "it is A", "C")]
    assert answers[1] == answers[2] and str(answers[0]) == "it is b"
    assert [contains.accepts(answer, ["A"]) for answer in answers] == [False, True, True, False]


def test_a_pattern_that_is_no_regular_expression_is_refused():
    with pytest.raises(ConfigError, match="is not a regular expression"):
        Pattern.parse({"pattern": "("}, "verifier")


def test_overlap_counts_the_words_of_both():
    # three of four words, and three of five: 2 · 3 / 9
    assert word_f1("order seven is late", "order seven is on time") == pytest.approx(2 / 3)
    assert (word_f1("a a b", "a b b"), word_f1("a", "b"), word_f1("", "b")) == (pytest.approx(2 / 3), 0.0, 0.0)
    # of scripts without spaces every character is a word
    assert word_f1("今天天气很好", "今天天气不好") == pytest.approx(10 / 12)
    verifier = Overlap.parse({"least": 0.6}, "verifier")
    assert verifier.verify("Order seven is late.", ["no", "The order, seven, is on time"])
    assert not Overlap().verify("Order seven is late.", ["order seven is on time"]) and not verifier.verify("", ["order"])


def test_answers_that_share_words_are_compared_by_how_many():
    found = verified_samples(Overlap(), ["order seven is late", "nothing"], ["no", "order seven is on time"])
    assert found.scores["f1"] == pytest.approx(1 / 3) and found.scores["accuracy"] == 0.0
    assert "f1" not in verified_samples(Exact(), ["no"], ["no"]).scores
