"""Readings of a text: as it stands, cleaned, and with usual disguises taken off, so that detectors see what a model would read.

Cleaned means Unicode's compatibility form (NFKC) without marks that any letter can carry (those of Indic and Thai letters and
of kana stay), without invisible and control characters, with letters in boxes and small capitals made plain, and with the
letters of other alphabets that look Latin made Latin where they stand in Latin text. A disguise is undone only where it shows:
leetspeak in words that mix letters and digits, single letters with gaps, base64, hexadecimal, percent signs and escapes where
they decode to text, ROT13 and reversed text where common words appear or a sign turns the text round, and quoted strings put
together. A reading is never shown to anybody.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

#: Characters of a text that are read, half from its beginning and half from its end, in steps that the guard works through.
LONGEST = 1_000_000
#: Most readings of a text, and how often what was decoded is decoded again.
MOST_READINGS = 8
_DEPTH = 2


@dataclass(frozen=True)
class Reading:
    """A text as it can be read. name: `plain`, or the disguise that was taken off."""

    name: str
    text: str


#: Letters that look Latin, each before its Latin one: Cyrillic, Greek, Armenian, and signs that NFKC leaves as they are.
_PAIRS = """
    аa еe оo рp сc уy хx ѕs іi јj ԁd ԛq ԝw һh ӏl вb нh кk мm тt АA ВB ЕE КK МM НH ОO РP СC ТT ХX УY ІI ЈJ ЅS
    αa οo ρp εe τt υu ιi κk νv χx ηn ωw ΑA ΒB ΕE ΖZ ΗH ΙI ΚK ΜM ΝN ΟO ΡP ΤT ΥY ΧX օo սu ոn ɑa ɡg ıi ɩi ǀl ℓl
"""
_LOOK_ALIKES = str.maketrans({pair[0]: pair[1] for pair in _PAIRS.split()})
#: Letters that nobody writes words with, which NFKC leaves as they are: negative circles and squares, regional indicators
#: (flags), small capitals.
_DRESSED = {
    first + number: chr(ord("a") + number) for first in (0x1F150, 0x1F170, 0x1F1E6) for number in range(26)
} | str.maketrans("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘꞯǫʀꜱᴛᴜᴠᴡʏᴢ", "abcdefghijklmnopqqrstuvwyz")
#: Marks of no script's own letters, and the points of Hebrew and Arabic.
_MARKS = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e8"
    "\u06ea-\u06ed\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+"
)
#: Characters that have what follows shown from right to left.
_TURNS = re.compile("[\u202e\u2067]")
_LEET = str.maketrans("4@3€1!05$7+89", "aaeeiiossttbg")
_WORD = re.compile(r"\S+")
_LATIN = re.compile(r"[A-Za-z]")
_LEET_WORD = re.compile(r"(?<![\w@$!+€\\])(?=[\w@$!+€]*[A-Za-z])(?=[\w@$!+€]*[0-9@$!+€])[\w@$!+€]{2,24}(?![\w@$])")
#: Single letters with separators between them.
_SPACED = re.compile(r"(?<![^\W_])(?:[^\W_][ .*_~|-]{1,3}){3,}[^\W_](?![^\W_])")
_SEPARATOR = re.compile(r"[.*_~|-]")
_BASE64 = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{16,}={0,2}(?![A-Za-z0-9+/=])")
_HEX = re.compile(r"(?:(?:0x|\\x)?[0-9A-Fa-f]{2}[ :,]?){8,}")
_BINARY = re.compile(r"(?:[01]{8}\s?){5,}")
_ESCAPED = re.compile(r"(?:\\u[0-9A-Fa-f]{4}|&#x?[0-9A-Fa-f]{2,6};)")
_PERCENT = re.compile(r"(?:%[0-9A-Fa-f]{2}){2}|%20")
_QUOTED = re.compile(r"'([^'\n]{2,400})'|\"([^\"\n]{2,400})\"|“([^”\n]{2,400})”")
_ROT13 = str.maketrans(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", "NOPQRSTUVWXYZABCDEFGHIJKLMnopqrstuvwxyzabcdefghijklm"
)
#: Common words of English, German, French, Spanish, Italian and Portuguese: two of them show that a text was read rightly.
_COMMON_WORDS = """
    the to how and you of in is do can for what that it with my tell give write make me this are your want without wie ich
    kann und der die das ein eine mich nicht ist zu comment je puis le la les des une dans mon est que pour cómo como puedo
    el los una por mi para quiero che posso il gli per mio voglio não uma posso meu com quero
    be have not on as at by from they we say her she or an will one all would there their so out if about who get which go
    when him know take people into see them than then now look only come its over think also back after use two our work
    first well way even new because any these us need should could show help please someone explain find
"""
_COMMON = frozenset(_COMMON_WORDS.split())
_ROTATED = frozenset(word.translate(_ROT13) for word in _COMMON)
_REVERSED = frozenset(word[::-1] for word in _COMMON if len(word) > 2) - _COMMON
_FEWEST_COMMON = 2
_PLAIN_WORD = re.compile(r"[^\W\d_]+")


def readings(text: str) -> list[Reading]:
    """The readings of a text, the plain one first; the others only where they differ from it. Text of any length and content,
    unpaired surrogates too."""
    plain = cleaned(text)
    found = {plain: Reading("plain", plain)}
    todo = [(text, plain, 0)]
    while todo and len(found) < MOST_READINGS:
        raw, clean, depth = todo.pop(0)
        for name, decoded, is_final in _decoded(raw, clean):
            reading = cleaned(decoded)
            if reading and reading not in found and len(found) < MOST_READINGS:
                found[reading] = Reading(name, reading)
                if depth + 1 < _DEPTH and not is_final:
                    todo.append((decoded, reading, depth + 1))
    return list(found.values())


def cleaned(text: str) -> str:
    """The text in NFKC without marks, invisible and control characters; look-alikes made Latin in Latin surroundings."""
    if not text.isascii():
        # a surrogate that stands alone has no UTF-8
        text = text.encode("utf-8", "replace").decode()
        kept = "".join(character for character in unicodedata.normalize("NFKC", text) if not is_invisible(character))
        text = unicodedata.normalize("NFC", _MARKS.sub("", unicodedata.normalize("NFD", kept)))
        if not text.isascii():
            text = _without_look_alikes(text.translate(_DRESSED))
    elif not text.isprintable():
        text = "".join(character if character >= " " or character in "\n\t\r" else "" for character in text)
    return text


@lru_cache(maxsize=4096)
def is_invisible(character: str) -> bool:
    """Whether a character takes no place: format, control and private ones, fillers, variation selectors, tags."""
    if character in "\n\t\r":
        return False
    if character in "\u115f\u1160\u3164\uffa0\u2800\u034f":
        return True
    return unicodedata.category(character) in ("Cf", "Cc", "Co", "Cn", "Cs") or "\ufe00" <= character <= "\ufe0f"


def hidden_characters(text: str) -> int:
    """How many invisible characters a text has that no script needs: joiners of emoji and of Arabic or Indic letters are not
    counted, nor the mark at the beginning of a file."""
    if text.isascii():
        return 0
    count = 0
    for place, character in enumerate(text):
        if ord(character) < 0x80 or not is_invisible(character) or "\ufe00" <= character <= "\ufe0f":
            continue
        if character == "\ufeff" and place == 0:
            continue
        before = text[place - 1] if place else " "
        is_joiner = character in "\u200c\u200d" and (ord(before) > 0x5FF)
        count += not is_joiner and character != "\u00ad"
    return count


def _without_look_alikes(text: str) -> str:
    """Look-alikes made Latin in a text that is mostly Latin or mixes alphabets in a word: it has no other reason for them."""
    latin = sum(1 for _ in _LATIN.finditer(text))
    letters = sum(character.isalpha() for character in text)
    if 2 * latin >= letters or any(map(_mixes, _WORD.findall(text))):
        return text.translate(_LOOK_ALIKES)
    return text


def _mixes(word: str) -> bool:
    return bool(_LATIN.search(word)) and word != word.translate(_LOOK_ALIKES)


def _decoded(raw: str, clean: str) -> Iterator[tuple[str, str, bool]]:
    """What a text may say when a disguise is taken off: its name, the text, and whether nothing is left to decode in it."""
    if mixed := _LEET_WORD.findall(clean):
        # where many words mix letters and digits, words of digits alone are words too: `70` is `to`
        pattern = _WORD if 3 * len(mixed) >= len(clean.split()) else _LEET_WORD
        yield "leetspeak", pattern.sub(lambda match: match.group().translate(_LEET), clean), True
    if _SPACED.search(clean):
        yield "spaced letters", _SPACED.sub(_joined, clean), False
    for name, pattern, decode in _CODES:
        parts = [decoded for match in pattern.finditer(clean) if (decoded := decode(match.group()))]
        if parts:
            yield name, "\n".join(parts), False
    if _ESCAPED.search(clean):
        yield "escapes", _ESCAPED.sub(_unescaped, clean), False
    if _PERCENT.search(clean):
        yield "percent signs", unquote(clean, errors="replace"), False
    words = [word.lower() for word in _PLAIN_WORD.findall(clean[:20_000])]
    if sum(word in _ROTATED for word in words) >= _FEWEST_COMMON:
        yield "rot13", clean.translate(_ROT13), True
    if _TURNS.search(raw) or sum(word in _REVERSED for word in words) >= _FEWEST_COMMON:
        yield "reversed", clean[::-1], True
    quoted = ["".join(match.groups(default="")) for match in _QUOTED.finditer(clean)]
    if len(quoted) > 1:
        yield "joined strings", "".join(quoted), True
        yield "joined strings", " ".join(quoted), True


def _joined(match: re.Match[str]) -> str:
    """Letters without their separators. A blank ends a word where others separate the letters, else two blanks do."""
    written = match.group()
    parts = written.split(" ") if _SEPARATOR.search(written) else re.split(r" {2,}", written)
    return " ".join(re.sub(r"[ .*_~|-]", "", part) for part in parts if part)


def _is_text(decoded: str) -> bool:
    """Whether what was decoded is readable: mostly letters and spaces."""
    if len(decoded) < 4:
        return False
    readable = sum(character.isalpha() or character in " .,!?'\"-\n" for character in decoded)
    return readable >= 0.85 * len(decoded)


def _base64(part: str) -> str | None:
    body = part.rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        decoded = base64.b64decode(body + "=" * (-len(body) % 4), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return decoded if _is_text(decoded) else None


def _hex(part: str) -> str | None:
    digits = re.sub(r"0x|\\x|[ :,]", "", part)
    try:
        decoded = bytes.fromhex(digits).decode("utf-8")
    except ValueError:
        return None
    return decoded if _is_text(decoded) else None


def _binary(part: str) -> str | None:
    bits = re.sub(r"\s", "", part)
    try:
        decoded = bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits) - 7, 8)).decode("utf-8")
    except ValueError:
        return None
    return decoded if _is_text(decoded) else None


def _unescaped(match: re.Match[str]) -> str:
    written = match.group()
    if written.startswith("\\u"):
        number = int(written[2:], 16)
    else:
        body = written[2:-1]
        number = int(body[1:], 16) if body[:1] in "xX" else int(body) if body.isdigit() else 0
    return chr(number) if 0x20 <= number < 0x110000 and not 0xD800 <= number < 0xE000 else " "


_CODES = (("base64", _BASE64, _base64), ("hexadecimal", _HEX, _hex), ("binary", _BINARY, _binary))
