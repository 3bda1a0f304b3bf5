"""Scan for personal data: the few places of a batch of texts where some may stand, found in one compiled pass."""

from __future__ import annotations

import numpy as np

from bessemer.data.text.compiled import compiled


def listed(words: str) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(word.strip() for word in words.split(","))


#: Words that introduce a telephone number, in lower case. The lines are English; German and Dutch; French, Spanish, Portuguese,
#: Italian and Romanian; the languages of the north; those of the middle and the east.
PHONE_WORDS = listed("""
    tel, telephone, phone, fax, telefax, mobile, mob, cell, cellphone, whatsapp, text, phone number, phone no, mobile number,
    mobile no, cell number, cell no, contact number, contact no, fax number, fax no, telephone number, telephone no,
    call, or call, call us, call me, call now, call at, call on, call us at, call us on, call me at, call me on,
    telefon, handy, rufnummer, telefonnummer, mobilnummer, handynummer, faxnummer, tel.-nr, tel.nr, tel. nr, tel-nr, telefoon,
    telefoonnummer,
    tél, téléphone, numéro de téléphone, telefono, teléfono, tfno, telf, móvil, telefone, telemóvel, telemovel,
    número de teléfono, numero de telefono, número de telefone, numero di telefono, număr de telefon,
    tlf, tfn, mobilnr, mobiltelefon, puhelin, puh,
    telefón, telefonszám, numer telefonu, nr telefonu, nr tel, telefonní číslo, telefónne číslo,
    τηλ, τηλέφωνο, тел, телефон, факс
""")
#: Words that have other meanings too and count only before a colon.
PHONE_COLON_WORDS = listed("fon, mobil, mobiel, durchwahl, portable, celular, cellulare, cep, моб, мобильный")

AT, IBAN, DOTTED, COLONS, CARD, PHONE = range(6)
_SPACE, _HASH, _OPEN, _CLOSE, _PLUS, _COMMA, _MINUS, _DOT, _SLASH = (ord(sign) for sign in " #()+,-./")
_ONE, _COLON, _AT_SIGN, _UNDERSCORE, _SMALL_A, _SMALL_F = (ord(sign) for sign in "1:@_af")
_NINE, _ZERO = ord("9"), ord("0")
#: The colon of Chinese and Japanese, `：`.
_WIDE_COLON = "：".encode()
_WIDE_1, _WIDE_2, _WIDE_3 = _WIDE_COLON
#: Setting this bit makes an ASCII letter small.
_SMALL = 0x20
#: The bytes that words for telephones end in. The bit makes capitals small in Greek and Cyrillic too.
_ENDINGS = tuple(sorted({word.encode()[-1] | _SMALL for word in PHONE_WORDS + PHONE_COLON_WORDS}))
_DIGIT, _UPPER, _LOWER, _MARK, _SIGN = 1, 2, 3, 4, 5


def _byte_classes() -> np.ndarray:
    classes = np.zeros(256, np.uint8)
    for low, high, kind in (("0", "9", _DIGIT), ("A", "Z", _UPPER), ("a", "z", _LOWER)):
        classes[ord(low) : ord(high) + 1] = kind
    classes[[ord("@"), ord(":")]] = _MARK
    classes[[ord("+"), ord("(")]] = _SIGN
    return classes


_CLASSES = _byte_classes()


def candidates(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places where personal data may stand: the kind, the place in `data` (of an e-mail the `@`, else the beginning), the text.

    Each (C,) int64.
    """
    size = max(256, len(data) // 256)
    while True:
        table = np.empty((3, size), np.int64)
        count = _scan(data, offsets, _CLASSES, table)
        if count <= size:
            return table[0, :count], table[1, :count], table[2, :count]
        size = count


@compiled
def _scan(data: np.ndarray, offsets: np.ndarray, classes: np.ndarray, table: np.ndarray) -> int:
    """Fill `table` (kind, place, text) as far as it reaches; return how many there are."""
    count = 0
    for text in range(len(offsets) - 1):
        first, last = offsets[text], offsets[text + 1]
        at = first
        while at < last:
            byte = data[at]
            kind = classes[byte]
            if kind == 0 or kind == _LOWER:
                at += 1
                continue
            place, what, step = at, -1, 1
            before = data[at - 1] if at > first else np.uint8(_SPACE)
            # beyond ASCII stand punctuation, and letters of scripts that put no space before a number
            joined = bool(_alphanumeric(before, classes) or before == _UNDERSCORE)
            if kind == _DIGIT:
                what, step = _number(data, at, first, last, classes, joined)
            elif kind == _SIGN:
                if not joined and before != _CLOSE and at + 9 < last and classes[data[at + 1]] == _DIGIT:
                    what = PHONE if byte == _PLUS or (classes[data[at + 3]] == _DIGIT and data[at + 4] == _CLOSE) else -1
                if what < 0 and byte == _OPEN and at + 7 < last and classes[data[at + 1]] == _DIGIT:
                    what = PHONE if _named(data, at, first) else -1
                # past the number's digits, so that they are not scanned again
                if what == PHONE:
                    while at + step < last and classes[data[at + step]] == _DIGIT:
                        step += 1
            elif kind == _UPPER:
                if not joined and at + 14 < last and _account(data, at, classes):
                    what, step = IBAN, 4
            elif byte == _AT_SIGN:
                if at > first and at + 3 < last and _alphanumeric(data[at + 1], classes) and _in_mailbox(before, classes):
                    what = AT
            elif at - 4 >= first and at + 2 < last and (data[at + 1] == _COLON or _hexadecimal(data[at + 1])):
                start = at - 4
                whole = _hexadecimal(data[start]) and _hexadecimal(data[start + 1])
                whole = whole and _hexadecimal(data[start + 2]) and _hexadecimal(data[start + 3])
                if whole and (start == first or not (_alphanumeric(data[start - 1], classes) or data[start - 1] == _COLON)):
                    place, what = start, COLONS
            if what >= 0:
                if count < table.shape[1]:
                    table[0, count], table[1, count], table[2, count] = what, place, text
                count += 1
            at += step
    return count


@compiled
def _number(data: np.ndarray, at: int, first: int, last: int, classes: np.ndarray, joined: bool) -> tuple[int, int]:
    """The kind of number that may begin here, and the digits of its first group."""
    group = at
    while group < last and classes[data[group]] == _DIGIT:
        group += 1
    length = group - at
    before = data[at - 1] if at > first else np.uint8(_SPACE)
    # part of a word, a decimal fraction, a path or a date
    if joined or before in (_DOT, _MINUS, _SLASH, _COMMA):
        return -1, length
    if 13 <= length <= 19:
        return CARD, length
    behind = data[group] if group < last else np.uint8(_SPACE)
    if length <= 3 and behind == _DOT:
        dots, place, run = 0, group, 0
        while place < last and (data[place] == _DOT or classes[data[place]] == _DIGIT) and dots < 4 and run <= 3:
            dots, run = (dots + 1, 0) if data[place] == _DOT else (dots, run + 1)
            place += 1
        if dots >= 3:
            return DOTTED, length
    if length == 4 and behind in (_SPACE, _MINUS) and group + 10 < last:
        run = group + 1
        while run < last and classes[data[run]] == _DIGIT:
            run += 1
        if (run - group == 5 or run - group == 7) and data[run] == behind:
            return CARD, length
    if length == 3 and behind in (_MINUS, _DOT) and group + 8 < last and data[group + 4] == behind:
        return PHONE, length
    if length == 1 and data[at] == _ONE and group + 12 < last and behind in (_SPACE, _MINUS, _DOT):
        following = data[group + 1]
        if following == _OPEN or (classes[following] == _DIGIT and data[group + 4] == behind):
            return PHONE, length
    if _named(data, at, first):
        return PHONE, length
    return -1, length


@compiled
def _named(data: np.ndarray, at: int, first: int) -> bool:
    """Whether a gap and a word before `at` end as words for telephones do."""
    word = at - 1
    gap = 0
    while word >= first and gap < 4:
        if data[word] == _SPACE or data[word] == _COLON or data[word] == _DOT or data[word] == _HASH:
            word -= 1
        elif word - 2 >= first and data[word] == _WIDE_3 and data[word - 1] == _WIDE_2 and data[word - 2] == _WIDE_1:
            word -= 3
        else:
            break
        gap += 1
    if word == at - 1 or word < first + 2:
        return False
    ending = data[word] | _SMALL
    return ending in _ENDINGS and (data[word - 1] | _SMALL) >= _SMALL_A


@compiled
def _account(data: np.ndarray, at: int, classes: np.ndarray) -> bool:
    """Whether a country's two letters and two check digits stand here."""
    return classes[data[at + 1]] == _UPPER and classes[data[at + 2]] == _DIGIT and classes[data[at + 3]] == _DIGIT


@compiled
def _in_mailbox(byte: np.uint8, classes: np.ndarray) -> bool:
    """Whether a byte may stand before the `@` of an address: a letter, a digit, `-`, `_`, `+`."""
    return _alphanumeric(byte, classes) or byte in (_MINUS, _UNDERSCORE, _PLUS)


@compiled
def _alphanumeric(byte: np.uint8, classes: np.ndarray) -> bool:
    return classes[byte] == _DIGIT or classes[byte] == _UPPER or classes[byte] == _LOWER


@compiled
def _hexadecimal(byte: np.uint8) -> bool:
    return bool(_ZERO <= byte <= _NINE or _SMALL_A <= (byte | _SMALL) <= _SMALL_F)
