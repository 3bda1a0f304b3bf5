"""Edit `personal_data`: e-mail and IP addresses, telephone, card and bank account numbers, masked and counted.

A compiled scan over the bytes names the few places where something may stand; Python judges those alone, by the rules of
each kind: check digits (ISO/IEC 7812-1 for cards, ISO 13616 for IBAN), the registries of addresses, the shapes that
telephone numbers have in print. Where a shape alone cannot tell (a telephone number from a column of figures), it takes a
`+` or a word such as "phone" before it: to mask too little is better than to ruin the arithmetic in a corpus, since what
is masked can be counted and what is ruined cannot be seen.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

import pyarrow as pa

from bessemer.data.edits.personal_data_scan import (
    AT,
    CARD,
    COLONS,
    DOTTED,
    IBAN,
    PHONE,
    PHONE_COLON_WORDS,
    PHONE_WORDS,
    candidates,
    listed,
)
from bessemer.data.edits.registry import PersonalData
from bessemer.data.text.texts import Span, Texts, masked

_COLUMN = {
    "email": "personal_data_emails",
    "ip": "personal_data_ips",
    "phone": "personal_data_phones",
    "card": "personal_data_cards",
    "iban": "personal_data_ibans",
}


def personal_data(texts: Texts, settings: PersonalData | None = None) -> tuple[pa.Array, dict[str, pa.Array]]:
    """The texts with personal data masked, and how much of each kind was found in each."""
    settings = settings or PersonalData()
    return masked(texts, lambda batch: find_personal_data(batch, settings), settings.masks, _COLUMN)


def find_personal_data(texts: Texts, settings: PersonalData) -> Iterator[Span]:
    """Everything found, in no order; spans may overlap."""
    buffer = texts.data.data
    for kind, place, number in zip(*(column.tolist() for column in candidates(texts.data, texts.offsets)), strict=True):
        first, last = int(texts.offsets[number]), int(texts.offsets[number + 1])
        if kind == AT and "email" in settings.kinds:
            span = _email(buffer, place, first, last, settings)
        elif kind == IBAN and "iban" in settings.kinds:
            span = _iban(buffer, place, last)
        elif kind in (DOTTED, COLONS) and "ip" in settings.kinds:
            span = _ip(buffer, place, first, last, settings)
        elif kind == CARD and "card" in settings.kinds:
            span = _card(buffer, place, first, last, settings)
        elif kind == PHONE and "phone" in settings.kinds:
            span = _phone(buffer, place, first, last)
        else:
            span = None
        if span:
            yield span


_LOCAL_BEFORE = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}\Z")
#: `https://user@host`, `://user:password@host`: part of an address of a page, no mailbox.
_IN_URL = re.compile(rb"//[^\s/]*\Z")
_DOMAIN = re.compile(rb"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}([A-Za-z]{2,24})(?![A-Za-z0-9_@])")
#: Second-level domains and endings that RFC 2606 and 6761 set aside.
_RESERVED_DOMAIN = re.compile(
    rb"(?i)(?:.*\.)?(?:example\.(?:com|net|org|edu)|(?:test|example|invalid|localhost|local)|(?:domain|email|your\w*)\.com)\Z"
)
#: Endings of files that look like top-level domains: `icon@2x.png`.
_FILE_ENDINGS = frozenset(
    b"bmp css csv dll exe gif gz html jpeg jpg js json jsx pdf php png svg tar ts tsx txt wav webp xml yaml yml".split()
)


def _email(buffer: memoryview, at: int, first: int, last: int, settings: PersonalData) -> Span | None:
    domain = _DOMAIN.match(buffer, at + 1, min(last, at + 260))
    if not domain or domain.group(1).lower() in _FILE_ENDINGS:
        return None
    window = max(first, at - 65)
    local = _LOCAL_BEFORE.search(bytes(buffer[window:at]))
    if not local:
        return None
    start = window + local.start()
    name, behind = bytes(buffer[start:at]), bytes(buffer[domain.end() : domain.end() + 1])
    if b".." in name or name.endswith(b".") or _IN_URL.search(bytes(buffer[max(first, start - 65) : start])):
        return None
    if behind == b":" and domain.end() < last and name in (b"git", b"hg", b"svn"):
        # `git@host:path`
        return None
    if not settings.reserved and _RESERVED_DOMAIN.match(buffer, at + 1, domain.end()):
        return None
    return Span(start, domain.end(), "email")


#: Not before `/24`, which makes it a network instead of a host.
_IPV4 = re.compile(rb"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?:\.(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)){3}(?![\w-]|\.\w|/\d)")
_IPV6 = re.compile(rb"[0-9A-Fa-f]{4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_DOCUMENTATION = [ipaddress.ip_network(net) for net in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")]
#: Dotted numbers whose parts are all smaller are mostly versions or sections, not addresses.
_PROBABLY_ADDRESS = 32


#: Words before a dotted number that make it a version: `version 11.0.36.12`, `versions 1.2 and 11.0.36.12`.
_VERSION = re.compile(
    r"(?i)(?:(?<![^\W_])(?:versions?|versionen|versión|versiones|versão|versões|versioni?|versie|wersja|ver|v|releases?|builds?"
    r"|revisions?|rev|firmware|версия|версии|版本|バージョン|버전)|版)[\s.:：=#v]{0,4}"
    r"(?:[0-9][0-9.]*(?:[\s,/]|and|or|to|und|oder|bis|[-–])+v?)*\Z"
)
_LONGEST_VERSIONS = 80


def _ip(buffer: memoryview, start: int, first: int, last: int, settings: PersonalData) -> Span | None:
    match = _IPV4.match(buffer, start, last) or _IPV6.match(buffer, start, last)
    if not match:
        return None
    written = match.group().decode()
    try:
        address = ipaddress.ip_address(written)
    except ValueError:
        return None
    if address.version == 4:
        before = bytes(buffer[max(first, start - _LONGEST_VERSIONS) : start]).decode("utf-8", errors="ignore")
        if max(address.packed) < _PROBABLY_ADDRESS or _VERSION.search(before):
            return None
    if address.version == 6 and (
        written.endswith("::") or (address.is_global and len(written.replace("::", ":").split(":")) < 3)
    ):
        # a prefix, or a word and a mark: `3974::`
        return None
    documentation = any(address in network for network in _DOCUMENTATION)
    if documentation:
        return Span(start, match.end(), "ip") if settings.reserved else None
    if address.is_global and not address.is_multicast:
        return Span(start, match.end(), "ip")
    if settings.private and address.is_private and not address.is_unspecified:
        return Span(start, match.end(), "ip")
    return None


#: Characters between an introducing word and its number, how many at most, and how many bytes before the number are searched.
_GAP = ".:：# \t\n\r"
_LONGEST_GAP = 4
_BEFORE = 40


def _introduced(before: bytes, words: tuple[str, ...], colon_words: tuple[str, ...] = ()) -> bool:
    """Whether `before` ends in one of the words, whole and in any case, and a gap; of `colon_words`, in a gap with a colon."""
    text = before.decode("utf-8", errors="ignore").lower()
    said = text.rstrip(_GAP)
    gap = text[len(said) :]
    if not 1 <= len(gap) <= _LONGEST_GAP:
        return False
    introducing = words + colon_words if ":" in gap or "：" in gap else words
    return said.endswith(introducing) and any(
        said.endswith(word) and not said[: -len(word)][-1:].isalpha() for word in introducing
    )


_CARD_SHAPE = re.compile(
    rb"(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{4,5}|\d{13,19})(?![\w*-]|[.,]\d| \d{4})"
)
_MORE_DIGITS_BEFORE = re.compile(rb"\d[ -]\Z")
#: Where issuers' numbers begin (four digits, both ends included), and how long they are.
_ISSUERS = (
    (4000, 4999, (13, 16, 19)),  # Visa; 13 digits until the nineties
    (5100, 5599, (16,)),  # Mastercard
    (2221, 2720, (16,)),
    (3400, 3499, (15,)),  # American Express
    (3700, 3799, (15,)),
    (6011, 6011, (16, 19)),  # Discover
    (6440, 6599, (16, 19)),
    (3528, 3589, (16, 19)),  # JCB
    (3000, 3059, (14,)),  # Diners Club
    (3600, 3699, (14,)),
    (3800, 3999, (14,)),
    (6200, 6299, (16, 17, 18, 19)),  # UnionPay
)
#: Numbers that payment firms publish for tests.
_TEST_NUMBERS = """
    4111111111111111 4242424242424242 4012888888881881 4000056655665556 4222222222222 5555555555554444 5105105105105100
    2223003122003222 5200828282828210 378282246310005 371449635398431 378734493671000 6011111111111117 6011000990139424
    3056930009020004 36227206271667 30569309025904 38520000023237 3530111333300000 3566002020360505 6200000000000005
"""
_TEST_CARDS = frozenset(_TEST_NUMBERS.split())
#: Words that introduce a card number, needed where it could be an article number.
_CARD_WORDS = listed("""
    card, visa, diners, card number, card no, karte, kreditkarte, kartennummer, carte, numéro de carte, tarjeta,
    número de tarjeta, carta, cartão, kaart, karta, kort
""")
#: Article numbers have 13 or 14 digits (GS1's GTIN), as some cards had and have.
_ARTICLE_LENGTHS = (13, 14)


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def gtin(digits: str) -> bool:
    """Whether the last digit is the check digit of an article number (GS1 General Specifications, 7.9): EAN-13, GTIN-14."""
    weighed = (int(digit) * (1, 3)[place % 2] for place, digit in enumerate(reversed(digits)))
    return sum(weighed) % 10 == 0


def _card(buffer: memoryview, start: int, first: int, last: int, settings: PersonalData) -> Span | None:
    match = _CARD_SHAPE.match(buffer, start, last)
    if not match or _MORE_DIGITS_BEFORE.search(bytes(buffer[max(first, start - 2) : start])):
        return None
    digits = re.sub(rb"\D", b"", match.group()).decode()
    issued = any(low <= int(digits[:4]) <= high and len(digits) in lengths for low, high, lengths in _ISSUERS)
    if not issued or not luhn(digits) or len(set(digits)) < 3 or digits.endswith("0000"):
        return None
    if digits in _TEST_CARDS and not settings.reserved:
        return None
    # one in ten article numbers has a card's check digit, and no card of 13 digits is issued any more
    is_article = len(match.group()) in _ARTICLE_LENGTHS and (len(digits) == 13 or gtin(digits))
    if is_article and not _introduced(bytes(buffer[max(first, start - _BEFORE) : start]), _CARD_WORDS):
        return None
    return Span(start, match.end(), "card")


_IBAN_SHAPE = re.compile(rb"[A-Z]{2}\d{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,4})?)(?![A-Za-z0-9])")
#: The length of an account number by country (SWIFT's registry of IBAN formats).
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FO GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS",
        23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VA",
        25: "LY PT ST",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU YE",
        31: "MT SC",
        32: "LC",
        33: "RU",
    }.items()
    for country in countries.split()
}


def iban_valid(number: str) -> bool:
    """Whether a number without spaces has its country's length and its check digits (ISO 13616: remainder 1 modulo 97)."""
    if _IBAN_LENGTHS.get(number[:2]) != len(number):
        return False
    return int("".join(str(int(character, 36)) for character in number[4:] + number[:4])) % 97 == 1


def _iban(buffer: memoryview, start: int, last: int) -> Span | None:
    match = _IBAN_SHAPE.match(buffer, start, last)
    while match:
        number = match.group().replace(b" ", b"").decode()
        if iban_valid(number):
            return Span(start, match.end(), "iban")
        # a word in capitals after the number looks like one more group: try again without the last group
        shorter = match.group().rfind(b" ")
        match = _IBAN_SHAPE.match(buffer, start, start + shorter) if shorter > 0 else None
    return None


#: Groups of digits have marks between them, so that there is one way to read a row of digits and no search among many.
_INTERNATIONAL = re.compile(
    rb"\+(?!\d{4}-\d\d-\d\d)[1-9]\d{0,14}(?:[ .-]?\(0?\d{1,4}\)[ .-]?\d{1,8})?(?:[ .-]\d{1,8}){0,6}(?![\w+*/^=%]|[.,]\d|-\w)"
)
_NORTH_AMERICAN = re.compile(
    rb"(?:1[ .-])?(?:\([2-9]\d\d\) ?[2-9]\d\d[ .-]\d{4}|[2-9]\d\d([.-])[2-9]\d\d\1\d{4})(?![\w+*/^=%-]|[.,]\d)"
)
#: A number behind an introducing word; no date.
_NAMED = re.compile(
    rb"(?!\d{4}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d{4})"
    rb"(?:\(\d{1,5}\)[ .-]?)?\d{1,8}(?:[ .\-/]{1,2}\d{1,8}){0,6}(?![\w*^=%]|[.,]\d|-\w)"
)
_DIGITS = re.compile(rb"\d")


def _phone(buffer: memoryview, start: int, first: int, last: int) -> Span | None:
    for shape, fewest in ((_INTERNATIONAL, 9), (_NORTH_AMERICAN, 10)):
        match = shape.match(buffer, start, min(last, start + 40))
        if match and fewest <= len(_DIGITS.findall(match.group())) <= 15 and _international_plausible(match.group()):
            return Span(start, match.end(), "phone")
    if _introduced(bytes(buffer[max(first, start - _BEFORE) : start]), PHONE_WORDS, PHONE_COLON_WORDS):
        match = _NAMED.match(buffer, start, min(last, start + 40))
        if match and 7 <= len(_DIGITS.findall(match.group())) <= 15:
            return Span(start, match.end(), "phone")
    return None


def _international_plausible(written: bytes) -> bool:
    """A sum's `+1000000000` is no number: round ones, and those with one digit alone, are nobody's."""
    digits = b"".join(_DIGITS.findall(written))
    return len(set(digits)) > 2 and not digits.endswith(b"00000")
