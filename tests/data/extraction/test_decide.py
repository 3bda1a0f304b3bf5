"""What becomes of the model's answers: given by hand here."""

from __future__ import annotations

import numpy as np

from bessemer.data.extraction.block_text import block_text
from bessemer.data.extraction.extract import decide
from bessemer.data.extraction.features import features
from bessemer.data.extraction.parsing import parse

LONG = "The converter stands twelve metres high, and when it tips the whole hall turns red for a quarter of an hour. " * 2


def kept(source: str, answers: list[float]) -> list[str]:
    data = np.frombuffer(source.encode(), np.uint8)
    page = parse(data)
    assert len(page.block_elements) == len(answers)
    rows, counts = features(data, page)
    keep = decide(np.array(answers), rows, counts, page, 0.5)
    return [block_text(data, page, int(block)).split()[0] for block in np.flatnonzero(keep)]


def test_the_threshold_decides():
    assert kept(f"<p>Menu<p>{LONG}<p>Footer", [0.4, 0.6, 0.1]) == ["The"]


def test_a_heading_goes_when_the_text_below_it_goes():
    source = f"<h1>Title</h1><p>{LONG}<h2>Related</h2><p>Ten bridges<h2>Again</h2><p>{LONG}<h3>Last</h3>"
    assert kept(source, [0.9, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9]) == ["Title", "The", "Again", "The"]


def test_a_heading_above_another_kept_heading_stays():
    source = f"<h2>Chapter</h2><h3>Section</h3><p>{LONG}<h2>One</h2><h2>Two</h2><p>{LONG}"
    assert kept(source, [0.9] * 6) == ["Chapter", "Section", "The", "One", "Two", "The"]


def test_a_label_with_a_colon_goes_with_what_it_announces():
    assert kept(f"<p>{LONG}<p>Further reading:<p>Ten bridges", [0.9, 0.9, 0.1]) == ["The"]


def test_a_table_of_data_stays_or_goes_as_a_whole():
    table = "<table><tr><th>Metal<th>Melts at<tr><td>Iron, pure and without carbon<td>1538</table>"
    assert kept(f"<p>{LONG}{table}", [0.9, 0.4, 0.4, 0.9, 0.4]) == ["The", "Metal", "Melts", "Iron,", "1538"]
    assert kept(f"<p>{LONG}{table}", [0.9, 0.6, 0.4, 0.1, 0.4]) == ["The"]


def test_the_title_is_kept_once():
    source = f"<title>How steel became cheap</title><h2>How steel became cheap</h2><h1>How steel became cheap</h1><p>{LONG}"
    assert kept(source, [0.9, 0.9, 0.9]) == ["How", "The"]


def test_below_a_hundred_characters_the_threshold_falls():
    assert kept(f"<p>Short.<p>{LONG}<p>Footer", [0.6, 0.3, 0.1]) == ["Short.", "The"]


def test_without_any_answer_text_that_is_no_link_is_kept():
    assert kept(f"<p>{LONG}<p><a href=x>Menu and more menu</a>", [0.0, 0.0]) == ["The"]
