from __future__ import annotations

import pytest

from bessemer.data.extraction.encoding import to_utf8

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


@pytest.mark.parametrize("label", ["nonsense", "", "hex", "\0", "utf-8 ; x"])
def test_an_unknown_label_is_passed_over(label):
    assert to_utf8(GERMAN.encode("cp1252"), encoding=label).decode() == GERMAN


def test_lone_surrogates_are_replaced():
    assert to_utf8("a\ud800b") == b"a?b"
