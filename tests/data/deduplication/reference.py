"""The same definitions once more, in plain Python and as slow as they like."""

from __future__ import annotations

import re
import unicodedata

_ALONE = re.compile(
    "[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d"
    "\U00020000-\U0003ffff]"
)
_INVISIBLE, _NUMBER = "\ue000", "\ue001"  # private use, which stands for a separator elsewhere


def words(text: str, folding: str) -> list[str]:
    """Words of a text as `folding` has them."""
    if folding == "exact":
        characters = [" " if c.isspace() or c == "\0" else c for c in text]
    else:
        characters = [_INVISIBLE if unicodedata.category(c) in ("Mn", "Me", "Cf") else _without(c) for c in text]
        if folding == "similar":
            number = rf"\d[\d{_INVISIBLE}]*([.,][0-9][\d{_INVISIBLE}]*)?"
            characters = list(re.sub(number, _NUMBER, "".join(characters)))
        characters = [_folded(c) for c in characters if c != _INVISIBLE]
    spaced = "".join(f" {c} " if _ALONE.match(c) and unicodedata.category(c) != "Nd" else c for c in characters)
    return [word for word in re.split(" +", spaced) if word]


def _without(character: str) -> str:
    return " " if unicodedata.category(character) == "Co" and ord(character) < 0x20000 else character


def _folded(character: str) -> str:
    if character == _NUMBER:
        return "0"
    if ord(character) >= 0x20000:
        return character
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category[0] in "PSZC":
        return " "
    bare = "".join(c for c in unicodedata.normalize("NFD", character.lower()) if unicodedata.category(c) != "Mn")
    return bare if len(bare) == 1 else character


def shingles(text: str, ngram: int) -> set[tuple[str, ...]]:
    found = words(text, "similar")
    if 0 < len(found) < ngram:
        return {tuple(found)}
    return {tuple(found[start : start + ngram]) for start in range(len(found) - ngram + 1)}


def jaccard(left: str, right: str, ngram: int) -> float:
    one, other = shingles(left, ngram), shingles(right, ngram)
    return len(one & other) / len(one | other) if one | other else 0.0
