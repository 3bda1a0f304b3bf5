"""Pieces taken out of texts: the seams, the protected parts, and lines, paragraphs, sentences and substrings that repeat."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data.deduplication.passages import (
    passages,
    repeated_lines,
    repeated_paragraphs,
    repeated_sentences,
    repeated_substrings,
)
from bessemer.data.deduplication.removals import SpanCollector, cut, span_type
from bessemer.data.text.texts import Texts
from tests.data.deduplication import reference
from tests.data.deduplication.corpora import applied, corpus_of, dropped, numbered


def cut_out(text: str, *spans: str) -> str:
    """The text without the first place of each piece."""
    data = text.encode()
    starts = [data.index(span.encode()) for span in spans]
    bounds = sorted((start, start + len(span.encode())) for start, span in zip(starts, spans, strict=True))
    found, words = cut(Texts.of([text]), np.array(bounds, dtype=np.int64).reshape(-1, 2), np.array([0, len(bounds)]))
    assert words[0] == len(found[0].as_py().split())
    return found[0].as_py()


@pytest.mark.parametrize(
    ("text", "spans", "expected"),
    [
        ("one two three", ["two"], "one three"),
        ("one two three", ["one"], "two three"),
        ("one two three", ["three"], "one two"),
        ("one two three", ["one two three"], ""),
        ("one two\nthree", ["two"], "one\nthree"),
        ("one\ntwo\nthree", ["two"], "one\nthree"),
        ("one\ntwo\nthree", ["two\n"], "one\nthree"),
        ("one\n\ntwo\n\nthree", ["two"], "one\n\nthree"),
        ("one\n\ntwo\n\nthree", ["two\n\n"], "one\n\nthree"),
        ("if x:\n    y\n    z\n", ["    y\n"], "if x:\n    z"),
        ("    y\n    z\n", ["    y"], "    z"),
        ("    y\n    z\n", ["    y\n"], "    z"),
        ("  y z\n", ["  y"], "z"),
        ("Wörter über Wörter", ["über"], "Wörter Wörter"),
        ("a b c d e", ["b", "d"], "a c e"),
    ],
)
def test_seams(text, spans, expected):
    assert cut_out(text, *spans) == expected


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=("Cs",))), max_size=5))
def test_texts_without_pieces_stay_byte_for_byte(texts):
    found, _ = cut(Texts.of(texts), np.zeros((0, 2), dtype=np.int64), np.zeros(len(texts) + 1, dtype=np.int64))
    assert found.to_pylist() == texts


PIECES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(1, 12), st.integers(0, 1)), max_size=25)


@settings(max_examples=100, deadline=None)
@given(PIECES)
def test_spans_are_united_less_what_is_protected(tmp_path_factory, given_spans):
    scratch = tmp_path_factory.mktemp("scratch")
    texts = dict.fromkeys(range(1, 5), "." * 50)
    corpus = corpus_of(texts, earlier={9: "."})
    collector = SpanCollector(corpus, scratch)
    lost, kept = defaultdict(set), defaultdict(set)
    for number, start, size, keep in given_spans:
        collector.add(np.array([(number, start, start + size, keep)], dtype=span_type(corpus)))
        (kept if keep else lost)[number] |= set(range(start, start + size))
    cuts = collector.close("too little", 0)
    expected = {number: lost[number] - kept[number] for number in texts}  # number 0 is the earlier corpus's
    assert len(cuts.ids) == sum(bool(bytes_lost) for bytes_lost in expected.values())
    bounds = np.fromfile(cuts.bounds, dtype=np.uint32).reshape(-1, 2)
    for row, (_, number) in enumerate(cuts.ids.tolist()):
        spans = bounds[cuts.offsets[row] : cuts.offsets[row + 1]].tolist()
        assert [byte for start, end in spans for byte in range(start, end)] == sorted(expected[number])
        assert all(end < following for (_, end), (following, _) in pairwise(spans))


# --- lines, paragraphs, sentences -----------------------------------------------------------------------------------


def units(text: str, unit: str, span: int = 1) -> list[str]:
    found = passages(Texts.of([text]), unit, span)
    return [text.encode()[start:end].decode() for start, end in found.bounds.tolist()]


def test_units_without_words_are_none():
    text = "one\n\n two \n---\nthree\n\nfour"
    assert units(text, "line") == ["one", " two ", "three", "four"]
    assert units(text, "paragraph") == ["one", " two \n---\nthree", "four"]


def test_spans_of_sentences_end_with_the_text():
    text = "One here. Two here! ??? Three here.\nFour here. "
    assert units(text, "sentence") == ["One here.", "Two here! ???", "Three here.", "Four here."]
    assert units(text, "sentence", 3) == ["One here. Two here! ??? Three here.", "Two here! ??? Three here.\nFour here."]
    assert units(text, "sentence", 5) == []


@settings(deadline=None)
@given(st.text(), st.sampled_from(["line", "paragraph", "sentence"]))
def test_units_hold_every_word_once(text, unit):
    text = text.encode("utf-8", "ignore").decode()
    assert [word for part in units(text, unit) for word in reference.words(part, "words")] == reference.words(text, "words")


LINES = [f"this is {word} line of six words" for word in ("the", "any", "some", "no", "each")] + ["short", "}", ""]
DOCUMENTS = st.lists(st.lists(st.sampled_from(LINES), max_size=6), max_size=6)


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_line_stays_in_the_smallest_id_alone(tmp_path_factory, documents, batch_rows, shuffled):
    texts = {number: "\n".join(lines) for number, lines in enumerate(documents)}
    order = list(texts)
    shuffled.shuffle(order)
    corpus = corpus_of(texts, order=order, batch_rows=batch_rows)
    cuts = repeated_lines(corpus, tmp_path_factory.mktemp("scratch"), least_words_left=0)
    owner: dict[str, int] = {}
    for number, lines in enumerate(documents):
        for line in lines:
            owner.setdefault(line, number)
    for number, (text, _) in applied(cuts, texts).items():
        expected = [line for line in documents[number] if len(line.split()) < 6 or owner[line] == number]
        assert text.split() == " ".join(expected).split()
        if expected == documents[number]:
            assert text == texts[number]


def test_each_batch_has_the_spans_of_its_own_documents(tmp_path):
    texts = {number: "\n".join(f"{LINES[line]}\nown {line}{number}" for line in range(number % 3, 4)) for number in range(7)}
    cuts = repeated_lines(corpus_of(texts), tmp_path, least_words_left=0)
    whole = applied(cuts, texts)
    assert cuts.spans == 3 + 2 + 4 + 3 + 2 + 4
    assert whole[5] == ("own 25\nown 35", None)
    for batch in ([1, 2], [5, 3], [2, 4, 6]):
        assert applied(cuts, {number: texts[number] for number in batch}) == {number: whole[number] for number in batch}


def test_a_document_with_too_little_left_is_dropped_and_shown_as_it_was(tmp_path):
    texts = [LINES[0] + "\nand this one has more to say", LINES[0] + "\nshort"]
    cuts = repeated_lines(corpus_of(texts), tmp_path, least_words_left=2)
    assert applied(cuts, texts)[1] == (texts[1], "too little left without repeated lines")
    assert dropped(repeated_lines(corpus_of(texts), tmp_path, least_words_left=1), texts) == {}


def test_paragraphs_and_sentences_of_an_earlier_corpus_are_cut_here(tmp_path):
    known = "First sentence stands here. The second one follows it. And a third ends.\n\nAnother paragraph of a few more words."
    new = "Something new begins this text. " + known.replace("first", "FIRST") + "\n\nIt ends in its own way here."
    texts, earlier = {3: new}, {5: known}
    found = applied(repeated_paragraphs(corpus_of(texts, earlier=earlier), tmp_path, least_words_left=0), texts)[3][0]
    assert found == new.replace("Another paragraph of a few more words.\n\n", "")
    found = applied(repeated_sentences(corpus_of(texts, earlier=earlier), tmp_path, least_words_left=0), texts)[3][0]
    assert found == "Something new begins this text.\n\nIt ends in its own way here."


# --- substrings -----------------------------------------------------------------------------------------------------


def without_repeated(texts: dict[int, str], length: int) -> dict[int, list[str]]:
    """The definition by brute force: of words in runs that stand at an earlier place, without those in a run's first place."""
    places = defaultdict(list)
    words = {number: text.split() for number, text in sorted(texts.items())}
    for number, found in words.items():
        for start in range(len(found) - length + 1):
            places[tuple(found[start : start + length])].append((number, start))
    lost, kept = defaultdict(set), defaultdict(set)
    for first, *others in places.values():
        if others:
            kept[first[0]] |= set(range(first[1], first[1] + length))
        for number, start in others:
            lost[number] |= set(range(start, start + length))
    return {
        number: [word for index, word in enumerate(found) if index not in lost[number] - kept[number]]
        for number, found in words.items()
    }


def maximal_repeats(texts: dict[int, str], length: int) -> set[tuple[int, int]]:
    """Words, as (document, index), in any substring of at least `length` words that occurs at two places, by comparing all."""
    words = [(number, index, word) for number, text in sorted(texts.items()) for index, word in enumerate(text.split())]
    found = set()
    for one in range(len(words)):
        for other in range(one + 1, len(words)):
            size = 0
            while (
                other + size < len(words)
                and words[one + size][2] == words[other + size][2]
                and words[one + size][0] == words[one][0]
                and words[other + size][0] == words[other][0]
            ):
                size += 1
            if size >= length:
                for place in (one, other):
                    found |= {words[place + step][:2] for step in range(size)}
    return found


WORDY = st.lists(
    st.one_of(
        st.lists(st.sampled_from("ab"), max_size=14),
        st.lists(st.sampled_from("abcdefg"), max_size=14),
        st.sampled_from([list("abcdefghij"), list("klmnopqrst")]),
    ),
    max_size=5,
).map(lambda parts: " ".join(word for part in parts for word in part))


@settings(max_examples=30, deadline=None)
@given(st.lists(WORDY, max_size=5), st.integers(2, 8), st.integers(1, 3), st.randoms(use_true_random=False))
def test_substrings_are_cut_as_by_brute_force(tmp_path_factory, texts, length, batch_rows, shuffled):
    order = list(range(len(texts)))
    shuffled.shuffle(order)
    corpus = corpus_of(texts, order=order, batch_rows=batch_rows)
    cuts = repeated_substrings(corpus, tmp_path_factory.mktemp("scratch"), length=length, least_words_left=0)
    expected = without_repeated(numbered(texts), length)
    assert {number: text.split() for number, (text, _) in applied(cuts, texts).items()} == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDY, max_size=3), st.integers(2, 8))
def test_words_in_repeated_runs_are_those_in_maximal_repeated_substrings(texts, length):
    """The equivalence on which the method rests."""
    places = defaultdict(list)
    for number, text in enumerate(texts):
        words = text.split()
        for start in range(len(words) - length + 1):
            places[tuple(words[start : start + length])].append((number, start))
    in_runs = {
        (number, start + step)
        for found in places.values()
        if len(found) > 1
        for number, start in found
        for step in range(length)
    }
    assert in_runs == maximal_repeats(numbered(texts), length)


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDY, max_size=5), st.integers(2, 8))
def test_every_repeated_run_still_stands_somewhere(tmp_path_factory, texts, length):
    cuts = repeated_substrings(corpus_of(texts), tmp_path_factory.mktemp("scratch"), length=length, least_words_left=0)
    left = [text.split() for text, _ in applied(cuts, texts).values()]

    def runs(documents):
        return {tuple(words[start : start + length]) for words in documents for start in range(len(words) - length + 1)}

    before = [run for text in texts for run in runs([text.split()])]
    repeated = {
        run
        for run in before
        if sum(words[start : start + length] == list(run) for words in map(str.split, texts) for start in range(len(words))) > 1
    }
    assert repeated <= runs(left)


def test_fifty_words_are_the_default_and_white_space_does_not_count(tmp_path):
    passage = [f"word{number}" for number in range(60)]
    texts = [
        "Before it. " + " ".join(passage) + " After it.",
        "Here again:\n" + "\n".join(passage[:50]) + "\nand on.",
        "Too short: " + " ".join(passage[:49]) + " end.",
    ]
    found = applied(repeated_substrings(corpus_of(texts), tmp_path, least_words_left=0), texts)
    assert [text for text, _ in found.values()] == [texts[0], "Here again:\nand on.", texts[2]]
