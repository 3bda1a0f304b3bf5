from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bessemer.data.text.compiled import fnv_hash
from bessemer.data.text.texts import Texts
from bessemer.data.text.word_rules import special_words
from bessemer.data.text.words import BEGINS_LINE, ENDS_SENTENCE, HAS_LETTER, IS_PUNCTUATION, IS_WORD
from tests.data import plain_python
from tests.data.plain_python import compiling

#: Characters that rules look at, more of them than chance would give.
HOSTILE = st.text(
    alphabet=st.sampled_from("aZé東9²'’\"().,…-–—~+*^=:;/<>@#$€%_|?!°😀。\n\r\t \xa0\x00\x1c\u0301\u2028的µkms")
    | st.characters(codec="utf-8"),
    max_size=40,
)
#: What special cases are made of.
PARTS = """
    don't e.g. U.S. :) 10 km http:// a.b .com @ user 's ... $ well - known : ) ( , . / -- I 'll cannot x Ok … % _ = 8 ° ' + 8)
    C. °C. é™ US$ 3 m/s am ’ · "" \'\' \\n
"""
PIECES = st.lists(st.sampled_from([*PARTS.split(), " ", "\n"]), max_size=9).map("".join)


def words_of(text):
    texts = Texts.of([text])
    data = texts.data.tobytes()
    return [data[start:end].decode() for start, end in zip(texts.words.starts, texts.words.ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("one  two\u3000three", ["one", "two", "three"]),
        ('"(don\'t!)"', ['"', "(", "do", "n't", "!", ")", '"']),
        ("They’ll go, cannot they?", ["They", "’ll", "go", ",", "can", "not", "they", "?"]),
        ("Mr. Bee, e.g. in the U.S. of NASA.", ["Mr.", "Bee", ",", "e.g.", "in", "the", "U.S.", "of", "NASA", "."]),
        ("well-known mid--dash a---b", ["well", "-", "known", "mid", "--", "dash", "a", "---", "b"]),
        (
            "10km at 5% for US$3.50 or 3€, yes.",
            ["10", "km", "at", "5", "%", "for", "US$", "3.50", "or", "3", "€", ",", "yes", "."],
        ),
        ("see http://a-b.org/x-y?z=1, or me@host.org!", ["see", "http://a-b.org/x-y?z=1", ",", "or", "me@host.org", "!"]),
        ("wait...what…ever....", ["wait", "...", "what", "…", "ever", "...."]),
        (
            "end.Begin a,b 1,000 x=y 3+4 and/or",
            ["end", ".", "Begin", "a", ",", "b", "1,000", "x", "=", "y", "3", "+", "4", "and/or"],
        ),
        ("def f(x): return :-)", ["def", "f(x", "):", "return", ":-)"]),
        ("__init__ #tag snake_case", ["_", "_", "init", "_", "_", "#", "tag", "snake_case"]),
        ("dog's ×2 ©2020 a😀b", ["dog", "'s", "×2", "©", "2020", "a", "😀", "b"]),
        ("At 20°C. or 9°R. of 5°.", ["At", "20", "°", "C", ".", "or", "9", "°", "R.", "of", "5", "°", "."]),
        ("\x00NUL\x00 e\u0301a", ["\x00NUL\x00", "e\u0301a"]),
    ],
)
def test_cases_worked_by_hand(text, words):
    assert words_of(text) == words


def test_special_words_are_made_of_their_parts():
    assert all("".join(parts) == spelt for spelt, parts in special_words().items())


@compiling
@given(HOSTILE | PIECES)
@example("a@b.cd-e@")
@example("http://x.yz-a http://-.yz-a")
@example("1.2.3.4/a-b a_.bc-d a..bc-d")
def test_any_text_is_cut_as_in_plain_python(text):
    assert words_of(text) == plain_python.words(text)


@compiling
@given(HOSTILE)
def test_what_is_known_of_each_word(text):
    words = Texts.of([text]).words
    spelt = words_of(text)
    lines = [len(plain_python.words(line)) for line in text.splitlines()]
    firsts = {sum(lines[:line]) for line in range(len(lines)) if lines[line]}
    for index, word in enumerate(spelt):
        assert words.characters[index] == len(word)
        expected = {
            HAS_LETTER: any(map(str.isalpha, word)),
            IS_WORD: not all(map(plain_python.is_symbol, word)),
            ENDS_SENTENCE: word in plain_python.TERMINALS,
            IS_PUNCTUATION: all(map(plain_python.is_punctuation, word)),
            BEGINS_LINE: index in firsts,
        }
        assert {bit: bool(words.traits[index] & bit) for bit in expected} == expected
        data = Texts.of([word]).data
        assert words.hashes[index] == fnv_hash(data, 0, len(data))


@pytest.mark.parametrize("character", list("(.-@a' \n1:\x00é😀"))
def test_a_million_of_one_character_are_cut(character):
    """In time linear in them: a quadratic loop would take hours."""
    words = Texts.of([character * 1_000_000]).words
    assert len(words) == {"(": 1_000_000, "'": 500_001, ":": 1_000_000, "-": 1, " ": 0, "\n": 0, "😀": 1_000_000}.get(
        character, 1
    )


def test_five_megabytes_in_one_line_are_cut():
    line = "a-b@c.de,(f) " * 400_000
    assert len(Texts.of([line]).words) == 400_000 * len(plain_python.words("a-b@c.de,(f)"))


@pytest.mark.peer(name="datatrove")
def test_words_are_those_of_spacy():
    import spacy

    tokenizer = spacy.blank("en").tokenizer
    texts = [
        "It's 5 o'clock (p.m.), isn't it? She'd've come at 10am; they're late...",
        "Visit https://example.org/a-b_c?d=e#f, mail a.b@c-d.co.uk: cost $5.00–$7, 20% off!",
        "def __init__(self, x=1): # TODO: 'quoted'\n\treturn self.x[1:] -> None == {\"a\": b}\n",
        "1) First—second; third/fourth… “quoted” «guillemets» ‘single’s’ 5'10\" 3x4 1-2 a+b R&D AT&T C++.",
        "Ünïcode naïve Straße, 東京。こんにちは世界！ Привет, мир. مرحبا، ¿qué? 10€ £5 ½ m² ☃ 👍🏽",
        "v1.2.3-beta.4 foo.Bar.baz e.g., i.e. etc. U.S.A. Ph.D. No. 5. a.m. x. I. II. :-) ;) <3 ):",
    ]
    for text in texts:
        assert words_of(text) == [token.text for token in tokenizer(text) if token.text.strip()]
