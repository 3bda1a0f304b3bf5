"""Terms of the search by words: how a text is divided into words, and what of a word is compared.

A word is a run of letters, digits and the marks that belong to them. Names such as `parseInt` are followed by their parts. Its
terms are what is left in small letters, without accents and English endings. Scripts that write no space between words give a
term for each character and each pair of neighbours, and Korean, whose words end in particles, each pair of syllables, as
Lucene's analysers do.
"""

from __future__ import annotations

import re
import unicodedata

from bessemer.retrieval.stemming import stem

#: English stop words: a question is searched for without them.
PLAIN_WORDS = frozenset(
    """a an the of in on at to for by with from as and or but nor not no is are was were be been being it its this that these
    those which who whom what when where how why do does did can could may might will would shall should must have has had you
    your i we they he she them his her our their there here then than so if into out up down over under about such also only
    very
    """.split()  # noqa: SIM905
)
#: Accents, and the vowels, tones and joiners of Hebrew, Arabic, Indic, Thai, Lao, Tibetan, Burmese and Khmer, which are neither
#: letters nor digits to `\w`.
_MARKS = (
    "\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0903\u093a-\u094f\u0951-\u0957\u0962\u0963"
    "\u0981-\u0983\u09bc-\u09cd\u0a01-\u0a03\u0a3c-\u0a4d\u0a70\u0a71\u0a81-\u0a83\u0abc-\u0acd\u0b01-\u0b03\u0b3c-\u0b57"
    "\u0b82\u0bbe-\u0bcd\u0c00-\u0c04\u0c3c-\u0c56\u0c81-\u0c83\u0cbc-\u0cd6\u0d00-\u0d03\u0d3b-\u0d4d\u0d81-\u0d83"
    "\u0dca-\u0ddf\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u0f71-\u0f84\u102b-\u103e\u1056-\u1059"
    "\u17b4-\u17d3\u200c\u200d"
)
_WORD = re.compile(rf"[\w{_MARKS}]+")
#: Where a capital begins a part of a name: parseInt, HTTPServer.
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
#: Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]+"
)
#: What Unicode sets apart as accents, and joiners.
_ACCENTS = re.compile("[\u0300-\u036f\u200c\u200d]+")
#: Latin letters that Unicode does not take apart.
_LIGATURES = str.maketrans({"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "ł": "l", "ı": "i"})
#: Korean syllables.
_HANGUL = re.compile("[\uac00-\ud7a3]+")
#: Runs of characters that are compared by their pairs.
_PAIRED = re.compile(f"{_SPACELESS.pattern}|{_HANGUL.pattern}")
#: What is compared, as a number: to be raised where a word gives other terms, so that indexes are built again.
TERMS_VERSION = 2
#: Characters above which a word is no word: an encoded picture, a key.
_LONGEST = 80


def words_of_text(text: str, *, names_apart: bool = True) -> list[str]:
    """The words of a text as it writes them, in order, behind them the parts of names, unless `names_apart` is false."""
    words: list[str] = _WORD.findall(text.replace("_", " "))
    return [*words, *(part for word in words for part in parts_of_name(word))] if names_apart else words


def searched_words(text: str) -> str:
    """The words of a text and the parts of its names, with spaces between them."""
    return " ".join(words_of_text(text))


def parts_of_name(word: str) -> list[str]:
    """`parse`, `Int` of `parseInt`; of a word that is no such name, none."""
    if word.islower() or not word.isascii():
        return []
    parts = _CAMEL.split(word)
    return parts if len(parts) > 1 else []


def is_plain(word: str) -> bool:
    """Whether a query is searched for without the word."""
    return word.lower() in PLAIN_WORDS


def terms_of(word: str) -> list[str]:
    """What is compared of a word: mostly one term; none of one that is too long."""
    if len(word) > _LONGEST and not _SPACELESS.search(word):
        return []
    folded = word.lower()
    if not folded.isascii():
        apart = unicodedata.normalize("NFKD", folded.translate(_LIGATURES))
        folded = unicodedata.normalize("NFC", _ACCENTS.sub("", apart))
        return [stem(term) for term in _parts(folded, single=True)]
    return [stem(folded)] if folded else []


def compared_words(text: str) -> list[str]:
    """The words of a text in small letters, stop words left out; of scripts without spaces and of Korean, pairs of characters:
    what a sentence and its source may share."""
    words = (word for word in _WORD.findall(text.lower()) if word not in PLAIN_WORDS)
    return [part for word in words for part in ([word] if word.isascii() else _parts(word))]


def _parts(word: str, *, single: bool = False) -> list[str]:
    """The pairs of neighbours in each run of characters that are compared so, a character that has no neighbour, and what
    stands around. single: also each character of a script without spaces."""
    parts: list[str] = []
    end = 0
    for run in _PAIRED.finditer(word):
        characters = run.group()
        pairs = [characters[place : place + 2] for place in range(len(characters) - 1)]
        is_single = len(characters) == 1 or (single and not _HANGUL.match(characters))
        parts += [word[end : run.start()], *(characters if is_single else ""), *pairs]
        end = run.end()
    return [part for part in (*parts, word[end:]) if part]
