from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bessemer.data.text.characters import LETTER, LINE_BREAK, SPACE, character_classes
from bessemer.data.text.lines import BEGINS_WITH_BULLET, ENDS_IN_ELLIPSIS, ENDS_IN_TERMINAL, IS_BLANK
from bessemer.data.text.texts import Texts
from tests.data import plain_python
from tests.data.plain_python import compiling

TEXT = st.text(
    alphabet=st.sampled_from("ab é東.…-•*!?。)\n\n\r\t \x0b\x1c\x85\u2028\xa0\x00") | st.characters(codec="utf-8"), max_size=40
)


def spelt(texts, spans):
    """The pieces of each text, as strings."""
    data = texts.data.tobytes()
    pieces = [data[start:end].decode() for start, end in zip(spans.starts, spans.ends, strict=True)]
    assert [len(piece) for piece in pieces] == spans.characters.tolist()
    return [pieces[first:last] for first, last in zip(spans.of_text, spans.of_text[1:], strict=False)]


@compiling
@given(st.lists(TEXT, max_size=4))
@example(["a\r\nb\r\n\r\n\rc\n\rd", "\r\n", "\n\n\na\n\n\n\nb \n\n", "\x1c\x1d\x1e\x85\u2029"])
def test_lines_paragraphs_and_characters_are_those_of_plain_python(batch):
    texts = Texts.of(batch)
    assert spelt(texts, texts.lines) == [text.split("\n") for text in batch]
    assert spelt(texts, texts.unicode_lines) == [text.splitlines() for text in batch]
    assert spelt(texts, texts.paragraphs) == [plain_python.paragraphs(text) for text in batch]
    assert texts.characters.tolist() == [len(text) for text in batch]


@compiling
@given(st.lists(TEXT, max_size=4))
def test_sentences_are_those_of_plain_python(batch):
    texts = Texts.of(batch)
    found = [[plain_python.words(sentence) for sentence in sentences] for sentences in spelt(texts, texts.sentences)]
    assert found == [plain_python.sentences(text) for text in batch]


def test_sentences_worked_by_hand():
    text = 'A heading\nHe said: "Go!" Then, e.g., he went... on. And on?! Yes.\n\n(No.)'
    texts = Texts.of([text])
    assert spelt(texts, texts.sentences) == [
        ["A heading", 'He said: "Go!"', "Then, e.g., he went... on.", "And on?!", "Yes.", "(No.)"]
    ]


@compiling
@given(TEXT)
def test_what_is_known_of_each_line(text):
    lines = Texts.of([text]).unicode_lines
    for line, traits in zip(text.splitlines(), lines.traits, strict=True):
        expected = {
            IS_BLANK: not line.strip(),
            BEGINS_WITH_BULLET: line.strip()[:1] in ("•", "-"),
            ENDS_IN_ELLIPSIS: line.rstrip().endswith(("...", "…")),
            ENDS_IN_TERMINAL: line[-1:] in plain_python.TERMINALS,
        }
        assert {bit: bool(traits & bit) for bit in expected} == expected


@compiling
@given(st.lists(TEXT, min_size=1, max_size=6), st.data())
def test_a_slice_of_a_batch_is_cut_as_by_itself(batch, data):
    first = data.draw(st.integers(0, len(batch) - 1))
    length = data.draw(st.integers(0, len(batch) - first))
    part, alone = Texts.from_arrow(pa.array(batch).slice(first, length)), Texts.of(batch[first : first + length])
    for pieces in ("words", "lines", "unicode_lines", "paragraphs", "sentences"):
        assert spelt(part, getattr(part, pieces)) == spelt(alone, getattr(alone, pieces))
    assert part.words.hashes.tolist() == alone.words.hashes.tolist()
    assert part.lines.hashes.tolist() == alone.lines.hashes.tolist()


def test_large_strings_are_read_as_strings_are():
    texts = Texts.from_arrow(pa.array(["a b", "ü\nc"], pa.large_string()))
    assert spelt(texts, texts.words) == [["a", "b"], ["ü", "c"]]


def test_what_was_found_is_found_once():
    texts = Texts.of(["a b"])
    assert texts.words is texts.words


def test_totals_are_by_text():
    lines = Texts.of(["a\nb", "", "c\n\nd\n"]).lines
    assert lines.counts.tolist() == [2, 1, 4]
    assert lines.total(np.arange(7)).tolist() == [0 + 1, 2, 3 + 4 + 5 + 6]


@pytest.mark.parametrize(("bit", "known"), [(SPACE, str.isspace), (LETTER, str.isalpha)])
def test_classes_are_those_of_python(bit, known):
    """Unicode's tables of this Python, and the surrogates that no text has left out."""
    classes = character_classes()
    codes = [code for code in range(len(classes)) if not 0xD800 <= code < 0xE000]
    assert [code for code in codes if bool(classes[code] & bit) != known(chr(code))] == []


def test_line_breaks_are_those_of_python():
    breaks = {code for code in range(0x3001) if len(f"a{chr(code)}b".splitlines()) > 1}
    assert set(np.flatnonzero(character_classes() & LINE_BREAK)) == breaks


@pytest.mark.parametrize("character", list("\n\r-.… "))
def test_a_million_of_one_character_are_cut_into_lines(character):
    texts = Texts.of([character * 1_000_000])
    assert len(texts.lines) == (1_000_001 if character == "\n" else 1)
    assert len(texts.unicode_lines) == (1_000_000 if character in "\n\r" else 1)
    assert len(texts.paragraphs) == (0 if character.isspace() else 1)


def test_bytes_that_could_be_written_are_read_as_others_are():
    """The loops are compiled for one of the two."""
    writable = pa.py_buffer(bytearray(b"a b"))
    array = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 3], np.int32)), writable])
    assert not Texts.from_arrow(array).data.flags.writeable
    assert len(Texts.from_arrow(array).words) == 2
