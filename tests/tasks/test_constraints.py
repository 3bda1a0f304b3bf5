from typing import get_args

import pytest

from bessemer.core.errors import ConfigError
from bessemer.tasks.constraints import Constraint, Constraints

LIST = "Here is what to buy:\n- milk\n* bread\n  • salt"

#: A constraint, answers that keep to it, and answers that do not.
TABLE = [
    ({"kind": "words", "at_least": 3}, ["one two three", "a b, c d."], ["one two", "well-known", "don't do", "… ! ?"]),
    ({"kind": "words", "at_least": 2, "at_most": 3}, ["one two", "un café noir"], ["one", "one two three four"]),
    ({"kind": "characters", "at_most": 5}, ["12345", "  12345\n"], ["123456", "1 2 3 4"]),
    (
        {"kind": "sentences", "at_least": 2, "at_most": 2},
        [
            "It rains. It pours.",
            "Stop! Who goes there?",
            'He said "no." Then he left',
            "下雨了。很大。",
            "Use e.g. this. Or that.",
            "1. Mix the flour.\n2. Bake it.",
            "  1) Mix the flour. \n 10. Bake it",
        ],
        ["It rains.", "One. Two. Three.", "It costs 3.5 pounds.", "Wait ...", "1. Mix.\n2. Bake.\n3. Eat.", "1. Mix and bake."],
    ),
    (
        {"kind": "paragraphs", "at_least": 2, "at_most": 2},
        ["One.\n\nTwo.", "One.\n \t\n\n\nTwo.", "One.\n\n***\n\nTwo.\n\n"],
        ["One.\nTwo.", "One.\n\nTwo.\n\nThree.", "One."],
    ),
    (
        {"kind": "bullets", "at_least": 3, "at_most": 3},
        [LIST, "- a\n- b\n- c"],
        ["- a\n- b", "-a\n-b\n-c", "1. a\n2. b\n3. c", "**a**\n**b**\n**c**", "---\n- a\n- b"],
    ),
    (
        {"kind": "numbered_items", "at_least": 2},
        ["1. a\n2. b", "1) a\n 2) b"],
        ["1. a", "- a\n- b", "1.5 a\n2.5 b", "Of 1. and 2. b"],
    ),
    (
        {"kind": "placeholders", "at_least": 2},
        ["Dear [name], at [street address]", "[a][b]"],
        ["Dear [name]", "[text](address) [more](address)", "- [x] done\n- [ ] open", "[] []"],
    ),
    (
        {"kind": "highlights", "at_least": 2},
        ["*one* and **two**", "*one part* and *another*"],
        ["*one*", "2 * 3 * 4 * 5 * 6", "* one\n* two\n* three", "**two*"],
    ),
    (
        {"kind": "word_frequency", "word": "iron", "at_least": 2},
        ["Iron, iron!", "iron-iron"],
        ["iron", "irons and ironing", ""],
    ),
    ({"kind": "word_frequency", "word": "iron", "at_most": 1}, ["steel", "Iron, and ironing"], ["iron and Iron"]),
    ({"kind": "letter_frequency", "letter": "q", "at_least": 2}, ["Quite a queue", "qq"], ["queue", "none"]),
    (
        {"kind": "required_words", "words": ["iron", "blast furnace"]},
        ["The Blast Furnace makes iron."],
        ["iron", "ironic blast furnaces"],
    ),
    (
        {"kind": "forbidden_words", "words": ["cat", "very good"]},
        ["A category.", "very, good"],
        ["The Cat.", "It is VERY GOOD!"],
    ),
    ({"kind": "starts_with", "text": "Dear reader"}, ["Dear reader, hello", '"dear reader"'], ["My dear reader", "Dear"]),
    (
        {"kind": "ends_with", "text": "Any questions?"},
        ["Done. Any questions?\n", 'So "any questions?"'],
        ["Any questions? No.", "Questions?"],
    ),
    (
        {"kind": "json", "keys": ["name"]},
        ['{"name": "iron"}', '```json\n{"name": null, "more": []}\n```', '``` \n\n {"name": 1}\n\u00a0\n ```'],
        ['{"title": 1}', '["name"]', "{'name': 1}", 'It is {"name": 1}', '{"name": NaN}', '{"name": 1', '{"name": 1} {}'],
    ),
    ({"kind": "json"}, ["[]", " 3 ", '"text"'], ["text", "[" * 100_000, "```\n```"]),
    ({"kind": "no_commas"}, ["One and two."], ["One, two.", "一，二"]),
    ({"kind": "upper_case"}, ["ALL OF IT 1!", "ÄRGER"], ["Not all", "123", "mostly UPPER"]),
    ({"kind": "lower_case"}, ["all of it 1!"], ["Not all", "123"]),
    ({"kind": "title"}, ["<<On iron>>\nText", "Text <<x>>"], ["<On iron>", "<<>>", "<<On\niron>>", "# On iron"]),
    ({"kind": "quoted"}, ['"Yes."', "“Yes”", "„Ja“", "«oui»"], ['"Yes', "Yes", '""', "'Yes'", '"Yes".']),
    (
        {"kind": "one_of", "options": ["Yes", "My answer is no."]},
        ["yes", " Yes. ", "my answer is no"],
        ["Yes, it is", "no", ""],
    ),
]


@pytest.mark.parametrize(("settings", "right", "wrong"), TABLE, ids=[row[0]["kind"] for row in TABLE])
def test_right_and_wrong_answers(settings, right, wrong):
    constraints = Constraints.parse([settings])
    assert [constraints.follows(answer) for answer in right] == [[True]] * len(right)
    assert [constraints.follows(answer) for answer in wrong] == [[False]] * len(wrong)


def test_every_kind_has_its_row_in_the_table():
    kinds = {of_kind.model_fields["kind"].default for of_kind in get_args(get_args(Constraint)[0])}
    assert kinds == {row[0]["kind"] for row in TABLE}
    assert len(kinds) >= 12


def test_an_answer_is_judged_by_each_constraint():
    constraints = Constraints.parse([{"kind": "no_commas"}, {"kind": "words", "at_most": 2}, {"kind": "lower_case"}])
    assert constraints.follows("One, two three") == [False, False, False]
    assert constraints.follows("one two three") == [True, False, True]


def test_a_fence_of_empty_lines_takes_no_time():
    """A pattern that is cubic in them takes weeks for so many."""
    assert Constraints.parse([{"kind": "json"}]).follows("```json" + "\n" * 200_000 + "x") == [False]


def test_an_empty_answer_keeps_to_nothing():
    constraints = Constraints.parse([{"kind": "no_commas"}, {"kind": "forbidden_words", "words": ["iron"]}])
    assert constraints.follows(" \n") == constraints.follows("") == [False, False]


def test_loosely_an_introduction_and_emphasis_are_forgiven():
    constraints = Constraints.parse([{"kind": "starts_with", "text": "Dear"}, {"kind": "json"}])
    answer = 'Here it is:\n{"a": 1}\nAnything else?'
    assert constraints.follows(answer) == [False, False]
    assert constraints.follows(answer, loose=True) == [False, True]
    assert constraints.follows("**Dear** reader", loose=True) == [True, False]


def test_the_instructions_say_what_is_checked():
    constraints = Constraints.parse(
        [
            {"kind": "words", "at_least": 3, "at_most": 3},
            {"kind": "word_frequency", "word": "{iron}", "at_most": 2},
            {"kind": "bullets", "at_least": 1},
            {"kind": "ends_with", "text": "Amen"},
        ]
    )
    assert constraints.instructions == (
        "Your answer must have exactly 3 words. Your answer must have at most 2 occurrences of the word “{iron}”. "
        "Your answer must have at least 1 bullet points, lines that begin with `- `. "
        "End your answer with exactly these words, and nothing after them: Amen"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([{"kind": "wrods", "at_least": 1}], "words"),
        ([{"kind": "words"}], "at_least or at_most must be given"),
        ([{"kind": "words", "at_least": 5, "at_most": 2}], "at_least 5 is more than at_most 2"),
        ([{"kind": "words", "at_least": -1}], "at_least"),
        ([{"kind": "bullets", "at_lest": 1}], "did you mean 'at_least'"),
        ([{"kind": "forbidden_words", "words": []}], "words"),
        ([], "constraints"),
    ],
)
def test_constraints_that_are_none_are_refused_in_one_line(wrong, message):
    with pytest.raises(ConfigError) as error:
        Constraints.parse(wrong)
    assert message in str(error.value) and "\n" not in str(error.value)
