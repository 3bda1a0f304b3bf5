from __future__ import annotations

import pyarrow as pa
import pytest

from bessemer.data.filters.language import language, words_of

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
