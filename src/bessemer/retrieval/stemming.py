"""Stems of English words: Porter's second stemmer, as Snowball has it in its third version (snowballstem.org, 2025)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache


def _pairs(text: str) -> dict[str, str]:
    return {suffix: "".join(rest) for suffix, *rest in map(str.split, text.split(","))}


_VOWELS = frozenset("aeiouy")
_DOUBLES = ("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")
#: Letters before which `li` is a suffix.
_BEFORE_LI = frozenset("cdeghkmnrt")
#: Words whose stem the rules miss, and those that are stems already.
_WHOLE = _pairs(
    "skis ski, skies sky, idly idl, gently gentl, singly singl, ugly ugli, early earli, only onli, sky sky, news news, "
    "howe howe, atlas atlas, cosmos cosmos, bias bias, andes andes"
)
#: Words that the rules for `ed` and `ing` leave.
_AFTER_PLURAL = frozenset("inning outing canning herring earring evening".split())  # noqa: SIM905
#: Beginnings behind which the first region starts, where the rule would put it earlier.
_BEGINNINGS = ("gener", "commun", "arsen", "past", "univers", "later", "emerg", "organ", "inter")

#: Suffixes and what takes their place, in the order of the rules.
_STEP_2 = _pairs(
    "tional tion, enci ence, anci ance, abli able, entli ent, izer ize, ization ize, ational ate, ation ate, ator ate, "
    "alism al, aliti al, alli al, fulness ful, ousli ous, ousness ous, iveness ive, iviti ive, biliti ble, bli ble, fulli ful, "
    "lessli less, ogist og, ogi og, li"
)
_STEP_3 = _pairs("tional tion, ational ate, alize al, icate ic, iciti ic, ical ic, ful, ness, ative")
_STEP_4 = "al ance ence er ic able ible ant ement ment ent ism ate iti ous ive ize ion".split()  # noqa: SIM905


def _longest_first(suffixes: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(suffixes, key=len, reverse=True))


_SUFFIXES_2, _SUFFIXES_3, _SUFFIXES_4 = map(_longest_first, (_STEP_2, _STEP_3, _STEP_4))


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """The stem of a word in small letters without accents and apostrophes. A `y` that is no vowel is written `Y` in between."""
    if len(word) <= 2 or not word.isascii() or not word.isalpha():
        return word
    if word in _WHOLE:
        return _WHOLE[word]
    word = _with_consonants(word)
    first, second = _regions(word)
    word = _without_plural(word)
    if word in _AFTER_PLURAL:
        return word
    word = _without_ed_and_ing(word, first)
    if len(word) > 2 and word[-1] in "yY" and word[-2] not in _VOWELS:
        word = word[:-1] + "i"
    word = _without_suffixes(word, first, second)
    return word.replace("Y", "y")


def _with_consonants(word: str) -> str:
    letters = list(word)
    for place, letter in enumerate(letters):
        if letter == "y" and (place == 0 or letters[place - 1] in _VOWELS):
            letters[place] = "Y"
    return "".join(letters)


def _regions(word: str) -> tuple[int, int]:
    """Where R1 and R2 begin: behind the first consonant that follows a vowel, and again from there."""
    beginning = next((one for one in _BEGINNINGS if word.startswith(one)), None)
    first = len(beginning) if beginning else _behind_syllable(word, 0)
    return first, _behind_syllable(word, first)


def _behind_syllable(word: str, start: int) -> int:
    for place in range(start + 1, len(word)):
        if word[place] not in _VOWELS and word[place - 1] in _VOWELS:
            return place + 1
    return len(word)


def _ends_in_short_syllable(word: str) -> bool:
    if word == "past":
        return True
    if len(word) == 2:
        return word[0] in _VOWELS and word[1] not in _VOWELS
    return (
        len(word) > 2 and word[-1] not in _VOWELS and word[-1] not in "wxY" and word[-2] in _VOWELS and word[-3] not in _VOWELS
    )


def _has_vowel(text: str) -> bool:
    return not _VOWELS.isdisjoint(text)


def _without_plural(word: str) -> str:
    """Step 1a."""
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith(("ied", "ies")):
        return word[:-2] if len(word) > 4 else word[:-1]
    if word.endswith("s") and not word.endswith(("us", "ss")) and _has_vowel(word[:-2]):
        return word[:-1]
    return word


def _without_ed_and_ing(word: str, first: int) -> str:
    """Step 1b. first: where R1 begins."""
    for longer in ("eedly", "eed"):
        if word.endswith(longer):
            rest = word[: -len(longer)]
            if rest in ("proc", "exc", "succ"):
                return f"{rest}eed"
            return f"{rest}ee" if len(rest) >= first else word
    suffix = next((one for one in ("ingly", "edly", "ing", "ed") if word.endswith(one)), None)
    if suffix is None:
        return word
    rest = word[: -len(suffix)]
    if not _has_vowel(rest):
        return word
    if suffix == "ing" and len(rest) == 2 and rest[1] == "y" and rest[0] not in _VOWELS:
        # dying, lying, tying
        return rest[0] + "ie"
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if rest.endswith(_DOUBLES):
        # add, egg, off
        return rest if len(rest) == 3 and rest[0] in "aeo" else rest[:-1]
    return rest + "e" if first >= len(rest) and _ends_in_short_syllable(rest) else rest


def _without_suffixes(word: str, first: int, second: int) -> str:
    """Steps 2 to 5. first, second: where R1 and R2 begin."""
    suffix = next((one for one in _SUFFIXES_2 if word.endswith(one)), None)
    if suffix is not None and len(word) - len(suffix) >= first:
        before = word[: -len(suffix)][-1:]
        if not ((suffix == "ogi" and before != "l") or (suffix == "li" and before not in _BEFORE_LI)):
            word = word[: -len(suffix)] + _STEP_2[suffix]
    suffix = next((one for one in _SUFFIXES_3 if word.endswith(one)), None)
    if suffix is not None and len(word) - len(suffix) >= (second if suffix == "ative" else first):
        word = word[: -len(suffix)] + _STEP_3[suffix]
    suffix = next((one for one in _SUFFIXES_4 if word.endswith(one)), None)
    if suffix is not None and len(word) - len(suffix) >= second and (suffix != "ion" or word[-4:-3] in ("s", "t")):
        word = word[: -len(suffix)]
    place = len(word) - 1
    if word.endswith("e") and (place >= second or (place >= first and not _ends_in_short_syllable(word[:-1]))):
        return word[:-1]
    if word.endswith("ll") and place >= second:
        return word[:-1]
    return word
