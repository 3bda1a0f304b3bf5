"""Words of texts, cut as datatrove's filters count them: by the rules of spaCy's English tokenizer.

White space separates. Of what stands between, punctuation is taken off at both ends, a character at a time, and each is a
word; the middle is cut at hyphens, commas, colons and slashes between letters, unless it reads as an address; and a few
words are known by their spelling (`english.special_words`). So `"(don't!)"` is the six words `" ( do n't ! )`, and `"`.

Everything is one pass over the bytes: a span of plain letters, which most are, costs one look at each character, one at
its hash. Time is linear in a text's length, whatever is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from bessemer.data.text.characters import (
    AFFIX,
    CURRENCY,
    DIGIT,
    ETHIOPIC_WORDSPACE,
    HYPHEN,
    LETTER,
    LINE_BREAK,
    LOWER,
    PICTURE,
    PLAIN,
    PUNCTUATION,
    QUOTE,
    SPACE,
    SYMBOL,
    TERMINAL,
    UPPER,
    character_classes,
    code_point,
    is_address,
    is_colon_full_stop,
    previous,
)
from bessemer.data.text.compiled import compiled, fnv_hash, slot_of, table_of
from bessemer.data.text.lines import Spans
from bessemer.data.text.word_rules import UNITS, special_words

#: What is known of a word, as bits of `Words.traits`.
HAS_LETTER = 1 << 0
#: it has a character that is no punctuation, symbol or control
IS_WORD = 1 << 1
#: it is one character that ends sentences
ENDS_SENTENCE = 1 << 2
IS_PUNCTUATION = 1 << 3
BEGINS_LINE = 1 << 4

# bytes
_LONGEST_SPECIAL = 16
# characters
_LONGEST_UNIT = 4
_BITS_OF_A_LENGTH = 8
#: How far back a letter of a script is looked for whose full stop is a colon.
_WORDS_NEAR = 4

_DOT, _PLUS, _MINUS, _COMMA, _STAR, _CARET, _DOLLAR, _COLON = (ord(character) for character in ".+-,*^$:")
_PERCENT, _EQUALS, _SECTION, _EN_DASH, _EM_DASH, _ELLIPSIS = (ord(character) for character in "%=§–—…")
_SLASH, _LESS, _MORE, _BAR, _SQUARED = (ord(character) for character in "/<>|²")
_DEGREE, _SCALES = ord("°"), (ord("C"), ord("F"), ord("K"))
_APOSTROPHE, _CURLY, _SMALL_S, _LARGE_S, _LARGE_A, _LARGE_C, _LARGE_U = (ord(character) for character in "'’sSACU")


@dataclass(frozen=True)
class Words(Spans):
    """The words of a batch of texts, their hashes (uint64) and what is known of each (uint8 of the bits above)."""

    hashes: np.ndarray
    traits: np.ndarray


class _Rules(NamedTuple):
    """Tables for the loops. A special word's value holds its parts' lengths in bytes, eight bits each, the first lowest."""

    classes: np.ndarray
    # (65536,) bool: with which two bytes special words begin
    pairs: np.ndarray
    special_keys: np.ndarray
    special_parts: np.ndarray
    unit_keys: np.ndarray


class _Found(NamedTuple):
    """Columns into which the cutting loops write words."""

    starts: np.ndarray
    ends: np.ndarray
    traits: np.ndarray


def find_words(data: np.ndarray, offsets: np.ndarray) -> Words:
    """The words of texts n, `data[offsets[n]:offsets[n + 1]]`: valid UTF-8, (bytes,) uint8 and (N + 1,) int64."""
    # untouched pages of these arrays take no memory
    most = int(offsets[-1] - offsets[0])
    found = _Found(np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.uint8))
    of_text, suffixes = np.zeros(len(offsets), np.int64), np.empty(max(np.diff(offsets), default=0), np.int64)
    count = _cut(data, offsets, _rules(), found, of_text, suffixes)
    starts, ends, traits = (column[:count] for column in found)
    characters, hashes = np.empty(count, np.int32), np.empty(count, np.uint64)
    _describe(data, starts, ends, character_classes(), characters, hashes, traits)
    return Words(starts, ends, of_text, characters, hashes, traits)


@cache
def _rules() -> _Rules:
    spelt, pairs = {}, np.zeros(1 << 16, np.bool_)
    for word, parts in special_words().items():
        key = word.encode()
        assert len(key) <= _LONGEST_SPECIAL
        spelt[key] = sum(len(part.encode()) << (_BITS_OF_A_LENGTH * index) for index, part in enumerate(parts))
        pairs[key[0] << 8 | key[1]] = True
    return _Rules(character_classes(), pairs, *table_of(spelt), table_of({unit.encode(): 1 for unit in UNITS})[0])


@compiled
def _cut(data: np.ndarray, offsets: np.ndarray, rules: _Rules, found: _Found, of_text: np.ndarray, suffixes: np.ndarray) -> int:
    """Write the words of all texts to `found`, and to `of_text` how many came before each text. Return their number.

    `suffixes` is scratch space for where each suffix of a span ends, until those before it are written.
    """
    count = 0
    for text in range(len(offsets) - 1):
        index, end = offsets[text], offsets[text + 1]
        begins_line = True
        while index < end:
            code, length = code_point(data, index)
            shared = rules.classes[code]
            start = index
            index += length
            if shared & SPACE or code == ETHIOPIC_WORDSPACE:
                begins_line |= shared & LINE_BREAK != 0
                continue
            while index < end:
                code, length = code_point(data, index)
                kind = rules.classes[code]
                if kind & SPACE or code == ETHIOPIC_WORDSPACE:
                    break
                shared &= kind
                index += length
            first = count
            parts = _parts(data, start, index, rules)
            if parts:
                count = _write_parts(start, parts, found, count)
            elif shared & PLAIN:
                count = _write(start, index, found, count)
            else:
                count = _cut_span(data, start, index, rules, found, count, suffixes)
            if begins_line:
                found.traits[first] |= BEGINS_LINE
                begins_line = False
        of_text[text + 1] = count
    return count


@compiled
def _cut_span(data: np.ndarray, start: int, end: int, rules: _Rules, found: _Found, count: int, suffixes: np.ndarray) -> int:
    """Take off what stands before and behind, until a special word or nothing more to take off is left."""
    first, taken = count, 0
    while start < end and not _parts(data, start, end, rules):
        prefix = _prefix(data, start, end, rules.classes)
        if prefix and start + prefix < end and _parts(data, start + prefix, end, rules):
            count = _write(start, start + prefix, found, count)
            start += prefix
            break
        suffix = _suffix(data, start + prefix, end, rules)
        if suffix and _parts(data, start, end - suffix, rules):
            suffixes[taken] = end
            taken += 1
            end -= suffix
            break
        if not prefix and not suffix:
            break
        if prefix:
            count = _write(start, start + prefix, found, count)
            start += prefix
        if suffix:
            suffixes[taken] = end
            taken += 1
            end -= suffix
    parts = _parts(data, start, end, rules)
    count = _write_parts(start, parts, found, count) if parts else _cut_inside(data, start, end, rules.classes, found, count)
    start = end
    while taken:
        taken -= 1
        count = _write(start, suffixes[taken], found, count)
        start = suffixes[taken]
    return _unite(data, first, count, rules, found)


@compiled
def _cut_inside(data: np.ndarray, start: int, end: int, classes: np.ndarray, found: _Found, count: int) -> int:
    """Write what lies between the joints of a word, and the joints; an address whole."""
    index, before, judged = start, 0, False
    written = start
    while index < end:
        joint = _joint(data, index, end, before, classes)
        if joint and index > start:
            if not judged and is_address(data, start, end, classes):
                break
            judged = True
            if index > written:
                count = _write(written, index, found, count)
            count = _write(index, index + joint, found, count)
            index += joint
            written = index
            code, _ = code_point(data, previous(data, index))
        else:
            code, length = code_point(data, index)
            index += max(joint, length)
        before = int(classes[code])
    if written < end:
        count = _write(written, end, found, count)
    return count


@compiled
def _write(start: int, end: int, found: _Found, count: int) -> int:
    """Append one word."""
    found.starts[count] = start
    found.ends[count] = end
    found.traits[count] = 0
    return count + 1


@compiled
def _write_parts(start: int, parts: int, found: _Found, count: int) -> int:
    """Append the words that a special word is, by their packed lengths."""
    while parts:
        length = parts & ((1 << _BITS_OF_A_LENGTH) - 1)
        count = _write(start, start + length, found, count)
        start += length
        parts >>= _BITS_OF_A_LENGTH
    return count


@compiled
def _parts(data: np.ndarray, start: int, end: int, rules: _Rules) -> int:
    """The lengths of the words that a special word is, packed; zero for any other."""
    if not 1 < end - start <= _LONGEST_SPECIAL or not rules.pairs[np.int64(data[start]) << 8 | np.int64(data[start + 1])]:
        return 0
    return rules.special_parts[slot_of(rules.special_keys, fnv_hash(data, start, end))]


@compiled
def _unite(data: np.ndarray, first: int, count: int, rules: _Rules, found: _Found) -> int:
    """Join neighbours from `first` on that together are one special word, such as `:` and `)`. Return the new count."""
    kept = index = first
    while index < count:
        last = index
        for other in range(index + 1, count):
            if found.ends[other] - found.starts[index] > _LONGEST_SPECIAL:
                break
            length = found.ends[other] - found.starts[index]
            if _parts(data, found.starts[index], found.ends[other], rules) == length:
                last = other
        _write(found.starts[index], found.ends[last], found, kept)
        kept += 1
        index = last + 1
    return kept


@compiled
def _dots(data: np.ndarray, start: int, end: int) -> int:
    """The number of full stops in a row from `start` on."""
    index = start
    while index < end and data[index] == _DOT:
        index += 1
    return index - start


@compiled
def _prefix(data: np.ndarray, start: int, end: int, classes: np.ndarray) -> int:
    """Bytes to take off at the beginning."""
    code, length = code_point(data, start)
    if classes[code] & (AFFIX | PICTURE | CURRENCY):
        return length
    if code == _DOT:
        dots = _dots(data, start, end)
        return dots if dots > 1 else 0
    if code == _PLUS:
        return 0 if start + 1 < end and classes[data[start + 1]] & DIGIT else 1
    if code in (_PERCENT, _EQUALS, _SECTION, _EN_DASH, _EM_DASH):
        return length
    if code in (_LARGE_A, _LARGE_C) and start + 1 < end and data[start + 1] == _DOLLAR:
        return 2
    if code == _LARGE_U and start + 2 < end and data[start + 1] == _LARGE_S and data[start + 2] == _DOLLAR:
        return 3
    return 0


@compiled
def _suffix(data: np.ndarray, start: int, end: int, rules: _Rules) -> int:
    """Bytes to take off at the end, of what begins at `start`."""
    if start >= end:
        return 0
    last = previous(data, end)
    code, length = code_point(data, last)
    kind = rules.classes[code]
    if kind & (AFFIX | PICTURE) or code in (_EN_DASH, _EM_DASH):
        return length
    if code == _DOT:
        return _final_stop(data, start, end, rules.classes)
    if last == start:
        return 0
    before = previous(data, last)
    code_before, _ = code_point(data, before)
    if code in (_SMALL_S, _LARGE_S) and code_before in (_APOSTROPHE, _CURLY):
        return end - before
    if rules.classes[code_before] & DIGIT and (code == _PLUS or kind & CURRENCY):
        return length
    for _ in range(_LONGEST_UNIT):
        if rules.classes[code] & DIGIT or last == start:
            return 0
        before = previous(data, last)
        code, _ = code_point(data, before)
        if rules.classes[code] & DIGIT:
            key = fnv_hash(data, last, end)
            return end - last if rules.unit_keys[slot_of(rules.unit_keys, key)] == key else 0
        last = before
    return 0


@compiled
def _final_stop(data: np.ndarray, start: int, end: int, classes: np.ndarray) -> int:
    """Bytes to take off where a full stop is last: a row of them, or one that ends a sentence and not an abbreviation."""
    index = end - 1
    while index > start and data[index - 1] == _DOT:
        index -= 1
    if end - index > 1:
        return end - index
    if index == start:
        return 0
    before = previous(data, index)
    code, _ = code_point(data, before)
    kind = classes[code]
    if kind & (DIGIT | LOWER | AFFIX):
        return 1
    if code in (_PERCENT, _SQUARED, _MINUS, _PLUS, _BAR):
        return 1
    if kind & UPPER and before > start:
        code_before, _ = code_point(data, previous(data, before))
        if classes[code_before] & UPPER or (code_before == _DEGREE and code in _SCALES):
            return 1
    return 0


@compiled
def _joint(data: np.ndarray, index: int, end: int, before: int, classes: np.ndarray) -> int:
    """Bytes of the joint between two words at `index`, behind a character of the classes `before`; zero where none is."""
    code, length = code_point(data, index)
    kind = classes[code]
    if kind & PLAIN:
        return 0
    if kind & PICTURE or code == _ELLIPSIS:
        return length
    dots = _dots(data, index, end)
    if dots > 1:
        return dots
    after = 0
    if index + length < end:
        code_after, _ = code_point(data, index + length)
        after = int(classes[code_after])
        if code in (_PLUS, _MINUS, _STAR, _CARET) and before & DIGIT and (after & DIGIT or code_after == _MINUS):
            return length
    if code == _DOT:
        return 1 if before & (LOWER | QUOTE) and after & (UPPER | QUOTE) else 0
    if code == _COMMA:
        return 1 if before & LETTER and after & LETTER else 0
    if not before & (LETTER | DIGIT):
        return 0
    if code in (_COLON, _LESS, _MORE, _EQUALS, _SLASH):
        return 1 if after & LETTER else 0
    return _hyphens(data, index, end, classes) if kind & HYPHEN else 0


@compiled
def _hyphens(data: np.ndarray, index: int, end: int, classes: np.ndarray) -> int:
    """Bytes of a hyphen, of up to three, or of up to two dashes, before a letter."""
    code, length = code_point(data, index)
    most = 3 if code == _MINUS else 2 if code == _EM_DASH else 1
    stop = index
    for _ in range(most):
        if stop + length > end or code_point(data, stop)[0] != code:
            return 0
        stop += length
        if stop < end and classes[code_point(data, stop)[0]] & LETTER:
            return stop - index
        if stop >= end:
            return 0
    return 0


@compiled
def _describe(
    data: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    classes: np.ndarray,
    characters: np.ndarray,
    hashes: np.ndarray,
    traits: np.ndarray,
) -> None:
    """Fill in what is known of each word."""
    for word in range(len(starts)):
        some, every, number = 0, 0xFFFF, 0
        is_word = False
        index = starts[word]
        while index < ends[word]:
            code, length = code_point(data, index)
            kind = int(classes[code])
            some |= kind
            every &= kind
            is_word |= kind & SYMBOL == 0
            number += 1
            index += length
        known = traits[word]
        if some & LETTER:
            known |= HAS_LETTER
        if is_word:
            known |= IS_WORD
        if every & PUNCTUATION:
            known |= IS_PUNCTUATION
        if number == 1 and every & TERMINAL:
            known |= ENDS_SENTENCE
        if data[starts[word]] == _COLON:
            first = word
            # stays within the line, before which another text may end
            while word - first < _WORDS_NEAR and not traits[first] & BEGINS_LINE:
                first -= 1
            if is_colon_full_stop(data, starts[first], ends[word]):
                known |= ENDS_SENTENCE
        characters[word] = number
        hashes[word] = fnv_hash(data, starts[word], ends[word])
        traits[word] = known
