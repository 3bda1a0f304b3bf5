from __future__ import annotations

import encodings.aliases
import re

import pytest

from bessemer.data.extraction.extract import codec_of, codec_of_page, to_utf8

GERMAN = "<p>Über den Fluß führt eine Brücke, größer als alle anderen, für Fußgänger und Züge.</p>"
JAPANESE = "<p>製鋼所の炉は注意深く加熱されなければならない。炎の色で分かる。</p>" * 3
CZECH = "<p>Příliš žluťoučký kůň úpěl ďábelské ódy, říká se v každé učebnici češtiny.</p>" * 3


@pytest.mark.parametrize(
    ("text", "encoding", "label"),
    [
        (GERMAN, "iso-8859-1", "iso-8859-1"),
        (GERMAN + "“quoted”", "cp1252", "latin-1"),
        (JAPANESE, "shift_jis", "Shift_JIS"),
        (JAPANESE, "euc_jp", "euc-jp"),
        (JAPANESE, "iso2022_jp", "ISO-2022-JP"),
        (CZECH, "cp1250", "windows-1250"),
        ("<p>炼钢炉</p>", "gb18030", "gb2312"),
    ],
)
def test_a_pages_own_word_on_its_encoding_counts(text, encoding, label):
    page = f'<meta http-equiv="Content-Type" content="text/html; charset={label}">{text}'
    assert to_utf8(page.encode(encoding)).decode() == page


def test_the_servers_word_counts_where_the_page_says_nothing():
    assert to_utf8(CZECH.encode("cp1250"), encoding="windows-1250").decode() == CZECH


def test_bytes_that_are_utf8_are_utf8_whatever_the_page_says():
    page = f"<meta charset=iso-8859-1>{GERMAN}".encode()
    assert to_utf8(page, encoding="latin-1") == page


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_decides_and_goes(encoding):
    assert to_utf8(GERMAN.encode(encoding)).decode() == GERMAN


def test_without_any_word_the_bytes_are_guessed():
    assert to_utf8(GERMAN.encode("cp1252")).decode() == GERMAN
    assert to_utf8((JAPANESE * 5).encode("euc_jp")).decode() == JAPANESE * 5


def test_utf8_cut_in_the_middle_of_a_character_stays_utf8():
    text = to_utf8((GERMAN * 20 + "ü").encode()[:-1]).decode()
    assert text.startswith(GERMAN) and text.endswith("\ufffd")


@pytest.mark.parametrize(
    ("label", "codec"),
    [
        ("iso-8859-1", "cp1252"),
        (" US-ASCII\n", "cp1252"),
        ("latin5", "cp1254"),
        ("TIS-620", "cp874"),
        ("gb2312", "gb18030"),
        ("windows-31j", "cp932"),
        ("ks_c_5601-1987", "cp949"),
        ("big5-hkscs", "big5hkscs"),
        ("iso-8859-8-i", "iso8859-8"),
        ("x-mac-cyrillic", "mac-cyrillic"),
        ("utf-16", "utf-16-le"),
        ("x-user-defined", None),
        ("iso-2022-kr", None),
    ],
)
def test_a_label_means_what_it_means_to_browsers(label, codec):
    assert codec_of(label) == codec


@pytest.mark.parametrize(
    ("label", "codec"),
    [("utf-16", "utf-8"), ("UTF-16BE", "utf-8"), ("x-user-defined", "cp1252"), ("koi8-r", "koi8-r"), ("punycode", None)],
)
def test_a_page_that_could_be_read_as_ascii_is_not_in_utf_16(label, codec):
    assert codec_of_page(label) == codec


def test_a_page_that_calls_itself_utf_16_is_read_as_utf_8():
    page = f"<meta charset=utf-16>{GERMAN}".encode()
    assert to_utf8(page) == page


def test_of_pythons_own_codecs_those_that_are_no_encodings_of_pages_are_not_used():
    """Among them `punycode`, whose time is quadratic in the length of the page."""
    labels = {
        *encodings.aliases.aliases,
        *encodings.aliases.aliases.values(),
        "punycode",
        "idna",
        "raw_unicode_escape",
        "undefined",
    }
    used = {label for label in labels if codec_of(label)}
    assert used and not any(
        re.search("puny|idna|escape|hex|zip|bz2|base64|quopri|rot|uu|undefined|utf_?7|cp437", label) for label in used
    )


def test_a_page_that_calls_itself_punycode_is_read_in_time_linear_in_its_length():
    page = b"<meta charset=punycode>\xfc-" + b"steel" * 80_000
    assert to_utf8(page).decode() == page.decode("cp1252")


@pytest.mark.parametrize("label", ["nonsense", "", "hex", "\0", "utf-8 ; x", "punycode"])
def test_an_unknown_label_is_passed_over(label):
    assert to_utf8(GERMAN.encode("cp1252"), encoding=label).decode() == GERMAN


def test_lone_surrogates_are_replaced():
    assert to_utf8("a\ud800b") == b"a?b"
