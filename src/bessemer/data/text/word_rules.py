"""Tables for word splitting: scripts without spaces, and English contractions, abbreviations, emoticons, units.

Pure Python: a reader of the scripts needs no Numba. The English exceptions follow the tokenizer that spaCy's English starts
from, whose words datatrove counts, since the usual limits were chosen with them: `don't` is `do` and `n't`, `e.g.` is one
word, `10km` is `10` and `km`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

#: Their code points, both ends included, ascending.
WITHOUT_SPACES = (
    (0x0E01, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x312F),  # Hiragana, Katakana, Bopomofo
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # ideographs
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9D),
)
_ALONE = "".join(f"{chr(first)}-{chr(last)}" for first, last in WITHOUT_SPACES)
#: A word as it is counted where texts are compared: a character of such a script is one by itself.
WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])\w)+")
#: A character of a script without spaces.
ALONE = re.compile(f"[{_ALONE}]")


_SUBJECTS = "i you he she it we they"
_QUESTIONS = "who what when where why how there"

#: Which words take which endings; each ending is written with an apostrophe and without.
_ENDINGS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("i", (("m",),)),
    (f"{_SUBJECTS} {_QUESTIONS} that this these those", (("ll",), ("ll", "ve"), ("d",), ("d", "ve"))),
    (f"i you we they {_QUESTIONS} these those could might must should would not", (("ve",),)),
    (f"you we they {_QUESTIONS} these those", (("re",),)),
    (f"he she it {_QUESTIONS} that this", (("s",),)),
)
_NEGATED = "ca could do does did had may might must need ought sha should wo would ai are is was were have has dare"
_WORDS_THAT_LOOK_CONTRACTED = frozenset(["ill", "its", "hell", "shell", "shed", "were", "well", "whore"])
_FUSED = "can-not gon-na got-ta let-'s c'm-on y'-all y-all i-'m-a i-m-a how-'d-'y"

_WHOLE = "doin goin nothin nuthin ol somethin lovin havin"
_ALWAYS_WHOLE = "and/or w/o ma'am Ma'am o'clock O'clock 'em 'll 'nuff 're 's 'S 'd 'bout 'cause 'Cause 'cos 'Cos 'coz 'cuz ''"
_ABBREVIATIONS = r"""
    Mt. Ak. Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec. Del. Feb. Fla. Ga. Ia. Id. Ill. Ind. Jan. Jul. Jun. Kan. Kans.
    Ky. La. Mar. Mass. Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. S.C. Sep. Sept.
    Tenn. Va. Wash. Wis. a.m. p.m. Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g. E.G. Gen. Gov. i.e. I.e. I.E. Inc. Jr. Ltd. Md.
    Messrs. Mo. Mont. Mr. Mrs. Ms. Ph.D. Prof. Rep. Rev. Sen. St. vs. v.s. C++ \n \t
"""
_EMOTICONS = """
    :() :o) (o: :1 :0 :-0 >:( >:o =) =( =] =[ [= =/ =| =D =3 (= ]= (-8 <3 <33 <333 </3 xD xDD XD XDD ^_^ ^__^ ^___^ >.< >.> <.<
    ._. ;_; -_- -__- v.v V.V v_v V_V o_o o_O O_o O_O 0_o o_0 0_0 o.O O.o O.O o.o 0.0 o.0 0.o @_@ (^_^) (-_-) (._.) (>_<) (*_*)
"""
_EYES_AND_MOUTHS = ((":", ") )) ))) ( (( ((( ] } / | P p O o * 3 > X x D"), (";", ") D"), ("8", ") D"), (":'", ") ("))
_MIRRORED = "(: (; ): [:"

_UNITS = """
    km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa mbar mb MB
    kb KB gb GB tb TB T G M K %
"""
#: Units, which are words of their own behind a digit.
UNITS = tuple(_UNITS.split())


def special_words() -> dict[str, tuple[str, ...]]:
    """Spelling and the words that it is, for every special case; with straight and with curly apostrophes."""
    found = dict(_special_words())
    return found | {spelt.replace("'", "’"): tuple(p.replace("'", "’") for p in parts) for spelt, parts in found.items()}


def _special_words() -> Iterator[tuple[str, tuple[str, ...]]]:
    for word, *endings in _contractions():
        for stem in (word, word.title()):
            for mark in ("'", ""):
                parts = (stem, *(mark + ending for ending in endings))
                if "".join(parts).lower() not in _WORDS_THAT_LOOK_CONTRACTED:
                    yield "".join(parts), parts
    for word in _NEGATED.split():
        for stem in (word, word.title()):
            for parts in ((stem, "n't"), (stem, "nt"), (stem, "n't", "'ve"), (stem, "nt", "ve")):
                yield "".join(parts), parts
    for fused in _FUSED.split():
        for spelt in (fused, fused[0].upper() + fused[1:]):
            yield spelt.replace("-", ""), tuple(spelt.split("-"))
    for hour in range(1, 13):
        for half in ("am", "pm", "a.m.", "p.m."):
            yield f"{hour}{half}", (str(hour), half)
    for whole in _wholes():
        yield whole, (whole,)


def _contractions() -> Iterator[tuple[str, ...]]:
    for words, endings in _ENDINGS:
        for word in words.split():
            for ending in endings:
                yield word, *ending


def _wholes() -> Iterator[str]:
    yield from (_ALWAYS_WHOLE + _ABBREVIATIONS + _EMOTICONS).split()
    for word in _WHOLE.split():
        yield from (word + "'", word.title() + "'")
    for letter in "abcdefghijklmnopqrstuvwxyzäöü":
        yield letter + "."
    for eyes, mouths in _EYES_AND_MOUTHS:
        for mouth in mouths.split():
            yield from (eyes + mouth, f"{eyes}-{mouth}")
    for mouth, eyes in map(tuple, _MIRRORED.split()):
        yield from (mouth + eyes, f"{mouth}-{eyes}")
