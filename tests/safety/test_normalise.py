"""Readings of a text: disguises are taken off where they show, and plain text is left alone."""

import base64
import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.safety.normalise import MOST_READINGS, cleaned, hidden_characters, readings

SAID = "how do you bake the cake with me"
DISGUISES = {
    "base64": base64.b64encode(SAID.encode()).decode(),
    "base64 twice": base64.b64encode(base64.b64encode(SAID.encode())).decode(),
    "rot13": codecs.encode(SAID, "rot13"),
    "hexadecimal": SAID.encode().hex(" "),
    "binary": " ".join(f"{byte:08b}" for byte in SAID.encode()),
    "reversed": SAID[::-1],
    "percent signs": "".join(f"%{byte:02x}" for byte in SAID.encode()),
    "escapes": "".join(f"\\u{ord(letter):04x}" for letter in SAID),
    "spaced letters": "  ".join(" ".join(word) for word in SAID.split()),
    "dotted letters": " ".join(".".join(word) for word in SAID.split()),
    "leetspeak": "h0w d0 y0u b4k3 th3 c4k3 w1th m3",
    "joined strings": "a = 'how do you ba'; b = 'ke the cake with me'",
}


@pytest.mark.parametrize("name", DISGUISES)
def test_a_disguise_is_taken_off(name):
    texts = [reading.text for reading in readings(f"Read this:\n{DISGUISES[name]}")]
    assert any(SAID in text for text in texts), texts


@pytest.mark.parametrize(
    "written",
    [
        "b\u0430k\u0435 the c\u0430ke",
        "b\u200ba\u200bke the c\u2060ake",
        "ｂａｋｅ the cake",
        "b\u0301ake th\u0308e cake",
        "b\U000e0061ake the cake",
        "b\u0336\u0489a\u0336ke the cake",
        "🅱🅰🅺🅴 🆃🅷🅴 🅲🅰🅺🅴",
        "🇧🇦🇰🇪 🇹🇭🇪 🇨🇦🇰🇪",
        "ʙᴀᴋᴇ ᴛʜᴇ ᴄᴀᴋᴇ",
    ],
)
def test_look_alikes_marks_and_invisible_characters_are_cleaned(written):
    assert cleaned(written) == "bake the cake"


@pytest.mark.parametrize("text", ["경쟁사", "निर्देश कैसे", "ガス", "มะม่วง", "どうやって"])
def test_marks_that_are_letters_of_a_script_stay(text):
    assert cleaned(text) == text


def test_text_that_a_sign_turns_round_is_read_from_its_end():
    assert "how" in next(one.text for one in readings("\u202ewoh\u202c") if one.name == "reversed")


@pytest.mark.parametrize(
    "text", ["Привет, как дела?", "Wie heißt du?", "def f(x): return x + 1", "我想烤一个蛋糕", "At 7pm I paid $5."]
)
def test_ordinary_text_has_no_reading_with_other_words(text):
    plain, *others = readings(text)
    assert plain.name == "plain" and all(other.name == "leetspeak" for other in others)


def test_emoji_and_the_scripts_that_need_joiners_hide_nothing():
    assert hidden_characters("👩\u200d🚀 می\u200cخواهم \ufeff"[:-1]) == 0
    assert hidden_characters("a\u200b\u200b\u2062b") == 3


@given(st.text(st.characters(), max_size=300))
def test_any_text_has_a_plain_reading_that_can_be_encoded(text):
    found = readings(text)
    assert found[0].name == "plain" and len(found) <= MOST_READINGS
    for reading in found:
        reading.text.encode()
