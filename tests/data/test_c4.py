from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.data.edits.line_removal import c4_lines, c4_terminal_lines
from bessemer.data.edits.registry import C4Lines, edit_plugin
from bessemer.data.filters.registry import filter_plugin
from bessemer.data.filters.rules import c4
from bessemer.data.plugins import arrow_types
from bessemer.data.text.texts import Texts
from tests.data import plain_python
from tests.data.plain_python import compiling

CITATION = re.compile(r"\[[0-9]*]|\[edit]|\[citation needed]")
UNSPACED = re.compile(
    "[\u0e01-\u109f\u1780-\u17ff\u3040-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d"
    "\U00020000-\U0003ffff]"
)
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
PROSE = ["A line of prose.", "A line of prose", "  indented line of prose!", "And so on...", "Home", "", "  "]
CONDEMNED = ["Enable JavaScript to go on.", "Read our Privacy Policy now.", "We use cookies { here }.", "javascript { a b"]
LOREM_IPSUM = ["Lorem Ipsum dolor sit javascript.", "Javascript terms of use lorem ipsum"]
LONG = ["x" * 1001 + " a b.", "x" * 1000 + " a b.", "é" * 1001 + " a b."]
CITED = ["Said so.[1][23] Then[edit] more [citation needed]", 'He said "no"[4]', "[[1] [1 [edi] x[]", "[9] [8] [7]"]
LINES = st.lists(st.sampled_from([*PROSE, *CONDEMNED, *LOREM_IPSUM, *LONG, *CITED]), max_size=8)
BREAKS = st.sampled_from(["\n", "\r\n", "\n\n", "\u2028", "\x0b"])


def in_plain_python(text, *, terminal_punctuation):
    kept, counts, is_kept, content = "", dict.fromkeys(edit_plugin("c4_lines").columns, 0), True, 0
    for line in text.splitlines(keepends=True):
        bare = line.splitlines()[0]
        rule = rule_that_drops(bare.strip(), terminal_punctuation)
        is_kept = rule is None
        if is_kept:
            without, number = CITATION.subn("", bare)
            content = len(kept + without)
            kept += without + line[len(bare) :]
            counts["c4_lines_citations"] += number
        elif bare.strip():
            counts[f"c4_lines_{rule}"] += 1
    return kept if is_kept else kept[:content], counts


def rule_that_drops(line, terminal_punctuation):
    words, without, lower = line.split(), CITATION.sub("", line), line.lower()
    unspaced = len(UNSPACED.findall(line))
    if not unspaced or 2 * unspaced < sum(map(len, words)):
        if any(len(word) > 1000 for word in words):
            return "long_word"
        if terminal_punctuation and (not without.endswith((".", "?", "!", '"', "'")) or without.endswith("...")):
            return "unterminated"
        if len(words) < 3:
            return "few_words"
    if "lorem ipsum" in lower:
        return None
    if "javascript" in lower:
        return "javascript"
    if "{" in line:
        return None
    return "policy" if any(policy in lower for policy in POLICIES) else None


def edited(edit, text):
    array, counts = edit(Texts.of([text]))
    return array[0].as_py(), {name: column[0].as_py() for name, column in counts.items()}


@pytest.mark.parametrize(("edit", "terminal_punctuation"), [(c4_lines, False), (c4_terminal_lines, True)])
@compiling
@given(lines=LINES, line_break=BREAKS, ends=st.booleans())
def test_texts_are_edited_as_in_plain_python(edit, terminal_punctuation, lines, line_break, ends):
    text = line_break.join(lines) + line_break * ends
    assert edited(edit, text) == in_plain_python(text, terminal_punctuation=terminal_punctuation)


@compiling
@given(st.text(alphabet=st.sampled_from("a [1]edit.{\n\r \x85é高ก") | st.characters(codec="utf-8"), max_size=60))
def test_any_text_is_edited_as_in_plain_python(text):
    assert edited(c4_lines, text) == in_plain_python(text, terminal_punctuation=False)


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"fewest_words": 0}, "Home\n\nA line of words.[1]"),
        ({"longest_word": 5, "citations": False}, ""),
        ({"javascript": False}, "A line of words.\nturn on Javascript"),
        ({"policy": False}, "A line of words.\nwe use cookies"),
        ({"javascript": False, "policy": False, "citations": False}, "A line of words.[1]\nturn on Javascript\nwe use cookies"),
    ],
)
def test_each_rule_of_lines_can_be_changed_and_switched_off(settings, left):
    text = "Home\n\nA line of words.[1]\nturn on Javascript\nwe use cookies"
    array, _ = c4_lines(Texts.of([text]), C4Lines(**settings))
    assert array[0].as_py() == left.replace("[1]", "[1]" if settings.get("citations") is False else "")


def test_a_case_worked_by_hand():
    text = (
        "Home\nA line of words.[1] Yes[edit].\r\n\n  Please turn Javascript on\nwe use cookies, you see\n\tThe end of it\nx y\n"
    )
    assert edited(c4_lines, text) == (
        "A line of words. Yes.\r\n\tThe end of it",
        {
            "c4_lines_long_word": 0,
            "c4_lines_unterminated": 0,
            "c4_lines_few_words": 2,
            "c4_lines_javascript": 1,
            "c4_lines_policy": 1,
            "c4_lines_citations": 2,
        },
    )


@compiling
@given(st.lists(st.lists(st.sampled_from(["a b c.", "d e f", " g  h i!"]), max_size=4).map("\n".join), max_size=4))
def test_texts_without_anything_to_drop_stay_byte_for_byte(batch):
    assert c4_lines(Texts.of(batch))[0].to_pylist() == batch


@compiling
@given(st.lists(LINES.map("\n".join), min_size=1, max_size=4))
def test_a_text_is_edited_the_same_alone_and_in_a_batch(batch):
    array, counts = c4_lines(Texts.of(batch))
    for index, text in enumerate(batch):
        assert (array[index].as_py(), {name: column[index].as_py() for name, column in counts.items()}) == edited(
            c4_lines, text
        )


@pytest.mark.parametrize("unit", ["[", "[1", "use ", "a", "\n", "{", "lorem ", "é b c "])
def test_five_megabytes_in_one_line_are_edited(unit):
    text = unit * (5_000_000 // len(unit.encode()))
    _, counts = edited(c4_lines, text)
    assert counts["c4_lines_long_word"] == (" " not in unit and unit != "\n")


@compiling
@given(st.text(alphabet=st.sampled_from('a.B!? \n{}loremipsum"') | st.characters(codec="utf-8"), max_size=60))
def test_documents_score_as_in_plain_python(text):
    scores = {name: column[0].as_py() for name, column in c4(Texts.of([text])).items()}
    assert scores == {
        "c4_lorem_ipsum": text.lower().count("lorem ipsum"),
        "c4_curly_brackets": text.count("{"),
        "c4_sentences": len(plain_python.sentences(text)),
    }


def test_lorem_ipsum_is_found_in_any_case():
    assert c4(Texts.of(["Lorem ipsum, LOREM IPSUM, lorem  ipsum"]))["c4_lorem_ipsum"].to_pylist() == [2]


def test_every_promised_column_is_there():
    assert {name: column.type for name, column in c4(Texts.of(["a"])).items()} == arrow_types(filter_plugin("c4").columns)
    for edit in (c4_lines, c4_terminal_lines):
        array, counts = edit(Texts.of(["a", ""]))
        assert {name: column.type for name, column in counts.items()} == arrow_types(edit_plugin("c4_lines").columns)
        assert len(array) == 2
