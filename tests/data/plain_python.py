"""The definitions of `data/text` once more, in plain Python and slowly: what its compiled loops are held against."""

from __future__ import annotations

import re
import unicodedata

from hypothesis import settings

from bessemer.data.text import characters
from bessemer.data.text import characters as scripts
from bessemer.data.text.word_rules import UNITS, special_words

#: The first call of a loop compiles it.
compiling = settings(deadline=None)

SPECIAL = special_words()
TERMINALS = {chr(code) for code in characters._code_points(characters._TERMINALS)}
AFFIXES = (set(characters._AFFIXES) | TERMINALS) - {"."}
QUOTES = set(characters._QUOTES)
CURRENCIES = set(characters._CURRENCIES)
ASCII_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
DIGITS = "0123456789"


# --- kinds of characters ------------------------------------------------------------------------------------------


def is_lower(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "M" or character in "\u200c\u200d" or (character.isalpha() and category not in ("Lu", "Lt"))


def is_upper(character: str) -> bool:
    return character.isalpha() and unicodedata.category(character) != "Ll"


def is_picture(character: str) -> bool:
    return unicodedata.category(character) == "So"


def length_in_words(word: str) -> int:
    """One, and more for what a script without spaces runs together."""
    codes = [ord(character) for character in word if scripts.is_without_spaces(ord(character))]
    ideographs = sum(code >= 0x3000 for code in codes)
    return max(1, ideographs // 2 + (len(codes) - ideographs) // 5)


def is_symbol(character: str) -> bool:
    is_control = unicodedata.category(character) == "Cc" and character not in "\t\n"
    return is_control or character in ASCII_PUNCTUATION or character in characters._SYMBOLS or character in TERMINALS


def is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] == "P"


# --- words --------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return [word for span in re.split(r"[\s\x1c-\x1f\u1361]+", text) if span for word in unite(cut(span))]


def cut(span: str) -> list[str]:
    before: list[str] = []
    behind: list[str] = []
    while span and span not in SPECIAL:
        prefix = prefix_of(span)
        if prefix and span[prefix:] in SPECIAL:
            before.append(span[:prefix])
            span = span[prefix:]
            break
        suffix = suffix_of(span[prefix:])
        stop = len(span) - suffix
        if suffix and span[:stop] in SPECIAL:
            behind.append(span[stop:])
            span = span[:stop]
            break
        if not prefix and not suffix:
            break
        before += [span[:prefix]] if prefix else []
        behind += [span[stop:]] if suffix else []
        span = span[prefix:stop]
    middle = (SPECIAL[span] if span in SPECIAL else inside(span)) if span else ()
    return [*before, *middle, *reversed(behind)]


def prefix_of(span: str) -> int:
    found = re.match(r"\.{2,}|US\$|[AC]\$|\+(?![0-9])|[%=§–—]", span)
    if found:
        return found.end()
    return int(span[0] in AFFIXES or span[0] in CURRENCIES or is_picture(span[0]))


def suffix_of(span: str) -> int:
    if not span:
        return 0
    found = re.search(r"(?:['’][sS]|\.{2,}|(?<=[0-9])\+|[–—])\Z", span)
    if found:
        return len(found[0])
    last, before = span[-1], span[-2:-1]
    if last in AFFIXES or is_picture(last) or (last in CURRENCIES and before and before in DIGITS):
        return 1
    if last == ".":
        if not before:
            return 0
        ends_a_word = before in DIGITS or is_lower(before) or before in AFFIXES or before in "%²-+|"
        is_scale = span[-3:-1] in ("°C", "°F", "°K")
        return int(ends_a_word or is_scale or (is_upper(before) and len(span) > 2 and is_upper(span[-3])))
    unit = re.search(r"(?<=[0-9])[^0-9]{1,4}\Z", span)
    return len(unit[0]) if unit and unit[0] in UNITS else 0


def inside(span: str) -> list[str]:
    if is_address(span):
        return [span]
    found, start, index = [], 0, 0
    while index < len(span):
        joint = joint_of(span, index)
        if joint and index:
            found += [span[start:index], span[index : index + joint]] if index > start else [span[index : index + joint]]
            start = index + joint
        index += max(joint, 1)
    return [*found, span[start:]] if start < len(span) else found


def joint_of(span: str, index: int) -> int:
    before, here, after = span[index - 1 : index] if index else "", span[index], span[index + 1 : index + 2]
    dots = re.match(r"\.{2,}", span[index:])
    if dots:
        return dots.end()
    if is_picture(here) or here == "…":
        return 1
    if not before:
        return 0
    if here in "+-*^" and before in DIGITS and after and after in DIGITS + "-":
        return 1
    if here == ".":
        ends = is_lower(before) or before in QUOTES
        return int(ends and after != "" and (is_upper(after) or after in QUOTES))
    if here == ",":
        return int(before.isalpha() and after.isalpha())
    if not (before.isalpha() or before in DIGITS):
        return 0
    if here in ":<>=/":
        return int(after.isalpha())
    hyphens = re.match(r"-{1,3}(?!-)|–|—{1,2}(?!—)|~", span[index:])
    return hyphens.end() if hyphens and span[index + hyphens.end() :][:1].isalpha() else 0


def is_address(span: str) -> bool:
    starts = [0, *(place + 1 for place, character in enumerate(span) if character == "@" and place)]
    scheme = 0
    while scheme < len(span) and (span[scheme].isalpha() or span[scheme] in DIGITS + "_+-."):
        scheme += 1
    if scheme > 1 and span[scheme:].startswith("://"):
        starts.append(scheme + 3)
    return any(is_host(span[start:]) for start in starts)


def is_host(span: str) -> bool:
    host = re.match(r"[A-Za-z0-9\u00a1-\uffff_.-]*", span)[0]
    *labels, top = host.split(".")
    return bool(
        labels
        and all(1 <= len(label) <= 64 and label[0] not in "_-" and label[-1] not in "_-" for label in labels)
        and 2 <= len(top) <= 63
        and all(map(is_lower, top))
        and re.fullmatch(r"(:[0-9]{2,5})?([/?#].*)?", span[len(host) :], re.DOTALL)
    )


def unite(found: list[str]) -> list[str]:
    united, index = [], 0
    while index < len(found):
        last = index
        for other in range(index + 1, len(found)):
            spelt = "".join(found[index : other + 1])
            if SPECIAL.get(spelt) == (spelt,):
                last = other
            if len(spelt) > 16:
                break
        united.append("".join(found[index : last + 1]))
        index = last + 1
    return united


# --- lines, paragraphs, sentences ---------------------------------------------------------------------------------


def paragraphs(text: str) -> list[str]:
    return re.split(r"\n{2,}", text.strip()) if text.strip() else []


def sentences(text: str) -> list[list[str]]:
    """The words of each."""
    found: list[list[str]] = []
    for line in text.splitlines():
        is_over, begins = False, True
        found_words = words(line)
        for number, word in enumerate(found_words):
            near = "".join(found_words[max(number - 4, 0) : number])[-12:]
            is_colon = bool(re.fullmatch(":+", word) and re.search("[\u0531-\u0588\u1200-\u135a]", near))
            is_end = is_colon or (len(word) == 1 and word in TERMINALS)
            if begins or (is_over and not is_end and not all(map(is_punctuation, word))):
                found.append([])
                begins = is_over = False
            is_over |= is_end
            found[-1].append(word)
    return found


# --- measures -----------------------------------------------------------------------------------------------------


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def repeated(pieces: list[str]) -> list[str]:
    """Those that were there before."""
    seen: set[str] = set()
    again = []
    for piece in pieces:
        if piece in seen:
            again.append(piece)
        seen.add(piece)
    return again


def n_grams(found: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]


def characters_of_top_n_gram(found: list[str], n: int) -> int:
    grams = n_grams(found, n)
    if not grams:
        return 0
    counts: dict[tuple[str, ...], int] = {}
    for gram in grams:
        counts[gram] = counts.get(gram, 0) + 1
    most = max(counts, key=counts.__getitem__)  # the first of several
    return len(" ".join(most)) * counts[most]


def characters_of_repeated_n_grams(found: list[str], n: int) -> int:
    seen: set[tuple[str, ...]] = set()
    total = start = 0
    while start + n <= len(found):
        gram = tuple(found[start : start + n])
        if gram in seen:
            total += sum(map(len, gram))
            start += n
        else:
            seen.add(gram)
            start += 1
    return total
