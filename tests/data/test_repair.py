from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data.edits.registry import edit_plugin
from bessemer.data.edits.repair import Repair, repair
from bessemer.data.plugins import arrow_types
from bessemer.data.text.texts import Texts


def repaired(text, **how):
    return repair(Texts.of([text]), Repair(**how))[0][0].as_py()


def counts(text, **how):
    found = repair(Texts.of([text]), Repair(**how))[1]
    return {name.removeprefix("repair_"): column[0].as_py() for name, column in found.items() if column[0].as_py()}


def cleaned_in_plain_python(text):
    """The same rules a character at a time."""
    for line_end in ("\r\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"):
        text = text.replace(line_end, "\n")
    invisible = {"\u200b", "\ufeff", "\u00ad", *map(chr, range(0x202A, 0x202F)), "\u2060", *map(chr, range(0x2066, 0x206A))}
    return "".join(c for c in text if c in "\n\t" or not (c in invisible or unicodedata.category(c) == "Cc"))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("text", ["café à la crème", "Größe und Übermaß", "señor Núñez", "l’été — bon…"])
def test_what_was_read_in_a_western_encoding_is_put_right(text, encoding):
    broken = text.encode().decode(encoding)
    assert repaired(broken) == text
    assert counts(broken)["mojibake_lines"] == 1


def test_what_was_read_in_a_cyrillic_encoding_is_put_right():
    assert repaired("Привет мир, как дела".encode().decode("cp1251", errors="replace")) == "Привет мир, как дела"


def test_only_the_broken_line_is_touched():
    text = "“curly” ﬁ &amp; ｗｉｄｅ\nschÃ¶n"
    assert repaired(text) == "“curly” ﬁ &amp; ｗｉｄｅ\nschön"


@pytest.mark.parametrize(
    "text",
    [
        "l’été à l’Île «élan» …",
        "naïve Ã la carte",
        "Привет, мир — «да»",
        "Ελληνικά, tiếng Việt, Ærøskøbing",
        "日本語「テキスト」です。",
        "می‌خواهم 👩‍👩‍👧 \u200f",
        "x² + y² = z², 20 °C, ½ £",
        "RÉSUMÉ® ©",
    ],
)
def test_sound_text_stays(text):
    assert repaired(text) == text
    assert repair(Texts.of([text]))[0].equals(Texts.of([text]).array)


def test_each_kind_is_counted():
    text = "a\x00b\x1b\r\nc\rd\x0ce\u200b\ufeff\u00ad\u2028f\x85\ufffd"
    assert repaired(text) == "ab\nc\nd\ne\nf\n\ufffd"
    assert counts(text) == {
        "control_characters": 2,
        "line_ends": 5,
        "invisible_characters": 3,
        "lost_characters": 1,
    }


def test_words_broken_at_line_ends_are_joined_when_asked_for():
    text = "the trans-\nformation of well-\nKnown 10-\n12 exam\u2010\n  ples"
    assert repaired(text) == text
    assert repaired(text, join_broken_words=True) == "the transformation of well-\nKnown 10-\n12 examples"
    assert counts(text, join_broken_words=True) == {"joined_words": 2}


@settings(deadline=None, max_examples=50)
@given(
    st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("\r\n\x00\x85\xad\u200b\u2028\u2060\ufeff"), max_size=40)
)
def test_any_text_is_cleaned_as_in_plain_python(text):
    assert repaired(text, mojibake=False) == cleaned_in_plain_python(text)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("Ã©â€™\x80\n"), max_size=20), max_size=4))
def test_texts_are_repaired_alone_as_in_a_batch(texts):
    array, found = repair(Texts.of(texts))
    assert array.to_pylist() == [repaired(text) for text in texts]
    assert {name: column.type for name, column in found.items()} == arrow_types(edit_plugin("repair").columns)
