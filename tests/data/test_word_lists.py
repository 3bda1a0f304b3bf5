from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ConfigError
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.automaton import FoldedTerms, Literals
from bessemer.data.word_lists.term_matcher import Category, Hit, TermMatcher, packaged_list, read_list, term_matcher_of

PACKAGED = sorted({file.stem for file in packaged_list("toxicity").parent.glob("*.yaml")} - {"urls"})


def counts_of(terms, *texts):
    """How often each term occurs in each text."""
    batch, each = Texts.of(list(texts)), np.arange(len(terms))
    occurrences, distinct = FoldedTerms(terms).count(batch.data, batch.offsets, each, np.ones(len(terms)), len(terms))
    assert ((occurrences > 0) == (distinct == 1)).all()
    return occurrences.astype(int).tolist()


def in_plain_python(term, text):
    """The same definition by a regular expression: every place where the words stand, overlaps included."""
    gap = r"(?:[^0-9A-Za-z\u00aa\u00b5\u00ba\u00c0-\uffff]|[\u2000-\u207f\u3000-\u303f])"
    words = [re.escape(word) for word in re.split(rf"{gap}+", term.strip("*").lower()) if word]
    pattern = f"{gap}+".join(words)
    pattern = pattern if term.startswith("*") else rf"(?<!(?!{gap})[\s\S]){pattern}"
    pattern = pattern if term.endswith("*") else rf"{pattern}(?!(?!{gap})[\s\S])"
    return len(re.findall(f"(?={pattern})", "".join(c.lower() if c.isascii() else c for c in text)))


def test_terms_know_neither_case_nor_punctuation_but_whole_words():
    terms = ["how to", "cat", "cat*", "*cat", "*cat*"]
    assert counts_of(terms, "How-To  keep CATS: a cat, concatenate tomcat") == [[1, 1, 2, 2, 4]]


def test_a_term_ends_with_its_text():
    assert counts_of(["one two"], "one", "two", "one two", "One…two", "none two", "one twos") == [[0], [0], [1], [1], [0], [0]]


def test_capitals_beyond_ascii_are_found_too():
    assert counts_of(["дурак", "straßen*"], "Дурак! ДУРАК, дурак. Straßenbahn") == [[3, 1]]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from(["a", "a b", "ab*", "*b", "*ab*", "b a b", "é", "aé*", "的*", "1a"]), min_size=1, unique=True),
    st.text(alphabet="aAbB1 -\né’\xa0—的。", max_size=30),
)
def test_any_text_counts_as_a_regular_expression_does(terms, text):
    assert counts_of(terms, text) == [[in_plain_python(term, text) for term in terms]]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=20), max_size=5))
def test_texts_count_alone_as_in_a_batch(texts):
    terms = ["a", "*b*", "c d"]
    together = counts_of(terms, *texts, "")
    assert together == [counts_of(terms, text)[0] for text in [*texts, ""]]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=6, unique=True), st.binary(max_size=60))
def test_literals_are_found_where_they_end(literals, data):
    ends, numbers = Literals(literals).find(np.frombuffer(data, np.uint8))
    expected = [
        (at + len(literal), number)
        for number, literal in enumerate(literals)
        for at in range(len(data))
        if data.startswith(literal, at)
    ]
    assert sorted(zip(ends.tolist(), numbers.tolist(), strict=True)) == sorted(expected)


def test_a_term_matcher_sums_weights_by_category_and_shows_its_hits():
    matcher = TermMatcher(
        [Category("metal", terms={"iron": 1.0, "molten*": 2.5}), Category("sums", patterns=(r"\d\+\d",), weight=0.5)]
    )
    occurrences, distinct = matcher.count(Texts.of(["Iron, iron and molten-iron: 1+1=2, 2+2=4", ""]))
    assert occurrences.tolist() == [[5.5, 1.0], [0, 0]]
    assert distinct.tolist() == [[3.5, 0.5], [0, 0]]
    assert matcher.hits("Iron, iron: 1+1") == [Hit("metal", "iron", 2), Hit("sums", r"\d\+\d", 1)]


def test_a_set_of_words_makes_a_term_for_each(tmp_path):
    file = tmp_path / "list.yaml"
    file.write_text(
        "sets:\n  metal: [iron, tin]\nores:\n  meaning: of ores\n  weight: 2\n  terms: ['{metal} ore', slag]\n",
        encoding="utf-8",
    )
    category = read_list(file)["ores"]
    assert category.meaning == "of ores"
    assert category.terms == {"iron ore": 2.0, "tin ore": 2.0, "slag": 2.0}


def test_a_plain_list_has_its_file_for_category_or_headings(tmp_path):
    file = tmp_path / "metals.txt"
    file.write_text("# ours\niron\npig iron # raw\n\n[gases]\nhelium\n", encoding="utf-8")
    assert {name: dict(category.terms) for name, category in read_list(file).items()} == {
        "metals": {"iron": 1.0, "pig iron": 1.0},
        "gases": {"helium": 1.0},
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [b", "not YAML"),
        ("- a", "maps categories"),
        ("a: {words: [b]}", "'a'"),
        ("a: ['{x} b']", "'x'"),
        ("a: ['!']", "no letter"),
        ("a: {patterns: ['(']}", "pattern"),
    ],
)
def test_a_bad_list_is_refused_with_its_place(tmp_path, content, said):
    file = tmp_path / "bad.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(said)):
        term_matcher_of(file)


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_lists_load_and_say_what_they_mean(name):
    matcher = term_matcher_of(packaged_list(name))
    for category in matcher.categories.values():
        assert category.meaning
        assert category.terms or category.patterns
