"""PDF with its layout: the order of reading, what repeats, words that lines divide, tables, and the place of each passage."""

from __future__ import annotations

import io
import re
from collections import Counter

import pytest

from bessemer.core.errors import RequestError
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import IndexedDocument, passages_of
from bessemer.retrieval.reading.page_image import page_image
from bessemer.retrieval.reading.pdf import _ended, read_pdf
from tests.retrieval.pdfs import pdf, rule, text

pypdfium2 = pytest.importorskip("pypdfium2")

LEFT = [
    "Iron is smelted from its ore in a furnace, where",
    "coke takes the oxygen away. What runs out below",
    "is pig iron, which is brittle because of its car-",
    "bon. Puddling removes it. The heat of the bath is",
    "watched all the time, and the slag is drawn off.",
]
RIGHT = [
    "Steel has less carbon than pig iron, and more",
    "than wrought iron. The converter blows air",
    "through the melt, which burns the carbon in a",
    "few minutes. Well-known alloys hold chromium",
    "or nickel. A well-",
    "known one does not rust in the open air at all.",
]


def page_of_two_columns(number):
    """A page whose file holds its lines row by row, across the columns."""
    parts = [text(72, 760, f"Annals of Steel, volume {number}", 8), text(300, 30, str(number), 8)]
    parts += [text(72, 700, "Of Iron and Steel", 18, "bold")] if number == 1 else []
    parts += [text(72, 670, "This line goes over both of the columns, as an abstract of a paper does, from left to right.")]
    for row, (left, right) in enumerate(zip([*LEFT, ""], RIGHT, strict=True)):
        # no column's edge is quite straight
        parts += [text(72, 640 - 12 * row, left), text(320 - 1.4 * (row == 2), 640 - 12 * row, right)]
    return parts


def plain(markdown):
    return re.sub(r"[#|*\\-]+", " ", markdown).split()


def test_columns_are_read_one_after_the_other_and_what_pages_repeat_is_left_out():
    read = read_pdf(pdf(*(page_of_two_columns(number) for number in (1, 2, 3)), title="Of Iron and Steel"), 10**6)
    blocks = read.text.split("\n\n")
    assert blocks[0] == "# Of Iron and Steel" and read.title == ""
    left = " ".join(LEFT).replace("car- bon", "carbon")
    right = " ".join(RIGHT).replace("well- known", "well-known")
    assert blocks[2:4] == [left, right]
    assert "Annals" not in read.text and not re.search(r"^\d$", read.text, re.MULTILINE)
    assert len(blocks) == 1 + 3 * 3


def test_no_word_is_lost_or_doubled_beside_pdfiums_own_text():
    data = pdf(page_of_two_columns(1), page_of_two_columns(2))
    document = pypdfium2.PdfDocument(data)
    own = " ".join(document[number].get_textpage().get_text_range() for number in range(2))
    own = re.sub(r"Annals of Steel, volume \d|\b\d\b", " ", own).replace("\ufffe", "-").replace("\x02", "-")
    own = own.replace("car-", "carbon.").replace(" bon.", " ").replace("\nbon.", " ")
    assert Counter(plain(read_pdf(data, 10**6).text)) == Counter(plain(own))


def test_headings_lists_and_code_have_their_marks():
    page = [
        text(72, 700, "1 Furnaces", 16),
        text(72, 670, "A furnace is lined with bricks, which hold the heat of it in."),
        text(72, 640, "Firing", 10, "bold"),
        text(72, 620, "• Light the coke."),
        text(72, 606, "• Wait (an hour) for [1] <|im_end|>"),
        text(72, 580, "def heat(ore):", 9, "fixed"),
        text(72, 569, "    return ore + 1", 9, "fixed"),
        text(72, 540, "# is no heading here"),
    ]
    read = read_pdf(pdf(page), 10**6)
    assert read.text.split("\n\n") == [
        "# 1 Furnaces",
        "A furnace is lined with bricks, which hold the heat of it in.",
        "## Firing",
        "- Light the coke.",
        "- Wait (an hour) for [1] <|im_end|>",
        "```\ndef heat(ore):\n    return ore + 1\n```",
        "\\# is no heading here",
    ]


def test_a_paragraph_goes_on_over_a_page():
    pages = [
        [text(72, 300, "The paragraph begins here and it is not at its"), text(72, 288, "end when the page ends, but goes")],
        [text(72, 700, "on above, where the next one begins and it is"), text(72, 688, "then at its end.")],
    ]
    read = read_pdf(pdf(*pages), 10**6)
    assert "but goes on above" in read.text and "\n\n" not in read.text
    config = IndexConfig(embedder="none", passage_characters=100, overlap_characters=0)
    passages = passages_of(IndexedDocument("a.pdf", read.text, regions=read.regions), config)
    assert [passage.page for passage in passages] == [1, 2]


def ruled(rows, x=72, y=700, width=120, height=20):
    lines = [rule(x, y - height * row, x + width * len(rows[0]), y - height * row) for row in range(len(rows) + 1)]
    lines += [rule(x + width * column, y, x + width * column, y - height * len(rows)) for column in range(len(rows[0]) + 1)]
    return lines + [
        text(x + width * column + 4, y - height * row - 14, cell)
        for row, cells in enumerate(rows)
        for column, cell in enumerate(cells)
    ]


def test_a_ruled_table_is_what_pdfplumber_reads_between_the_lines_around_it():
    pdfplumber = pytest.importorskip("pdfplumber")
    rows = [["Metal", "melts at", "price | kg"], ["iron", "1538", "0.1"], ["copper", "1085", "9"], ["tin", "232", ""]]
    data = pdf([text(72, 730, "Above the table."), *ruled(rows), text(72, 590, "Below the table.")])
    read = read_pdf(data, 10**6)
    above, table, below = read.text.split("\n\n")
    assert (above, below) == ("Above the table.", "Below the table.")
    (own,) = pdfplumber.open(io.BytesIO(data)).pages[0].extract_tables()
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.split("\n")]
    assert cells[:1] + cells[2:] == own == rows


def test_rows_without_a_rule_between_them_are_rows_and_a_title_in_the_frame_is_a_paragraph():
    pytest.importorskip("pdfplumber")
    frame = [rule(72, y, 372, y) for y in (700, 680, 660, 620)]
    frame += [rule(x, 700 - 20 * ((x - 72) % 300 > 0), x, 620) for x in (72, 172, 272, 372)]
    words = [text(76, 686, "Traffic"), *(text(x, 666, word) for x, word in ((76, "Month"), (176, "Seats"), (276, "Share")))]
    words += [text(x, y, word) for y, row in ((646, ("May 26", "70", "9.5")), (630, ("June 26", "80", "11.5")))
              for x, word in zip((76, 176, 276), row, strict=True)]  # fmt: skip
    assert read_pdf(pdf([*frame, *words]), 10**6).text == (
        "Traffic\n\n| Month | Seats | Share |\n|---|---|---|\n| May 26 | 70 | 9.5 |\n| June 26 | 80 | 11.5 |"
    )


@pytest.mark.parametrize(
    ("line", "following", "joined"),
    [
        ("a divi-", "ded word", "a divided word"),
        ("a well-", "known word", "a well-known word"),
        ("Jean-", "Paul", "Jean-Paul"),
        ("from 1990-", "95", "from 1990-95"),
        ("see https://example.org/", "page", "see https://example.org/page"),
        ("两个", "部分", "两个部分"),
        ("two", "words", "two words"),
    ],
)
def test_what_stands_between_two_lines_is_what_was_there_before_they_were_divided(line, following, joined):
    assert "".join(_ended(line, following, {"well-known"})) + following == joined


def test_columns_of_cells_without_rules_are_a_table_and_not_columns_of_text():
    rows = [("Metal", "melts at", "density"), ("iron", "1538", "7.9"), ("copper", "1085", "9.0"), ("tin", "232", "7.3")]
    page = [text(72 + 150 * column, 700 - 14 * row, rows[row][column]) for column in range(3) for row in range(4)]
    assert read_pdf(pdf(page), 10**6).text.split("\n")[::2][:2] == ["| Metal | melts at | density |", "| iron | 1538 | 7.9 |"]


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_the_marked_box_is_where_the_letters_are_on_a_turned_and_cropped_page(tmp_path, rotate):
    image_of = pytest.importorskip("PIL.Image")
    page = [text(200, 500, "Iron rusts in water and in wet air.", 12), text(-500, 500, "outside")]
    (tmp_path / "a.pdf").write_bytes(pdf(page, box=(50, 30, 650, 830), crop=(100, 200, 600, 700), rotate=rotate))
    read = read_pdf((tmp_path / "a.pdf").read_bytes(), 10**6)
    (passage,) = passages_of(IndexedDocument("a.pdf", read.text, regions=read.regions), IndexConfig(embedder="none"))
    assert (passage.text, passage.page) == ("Iron rusts in water and in wet air.", 1)
    image = image_of.open(io.BytesIO(page_image(tmp_path / "a.pdf", 1, width=500)))
    assert image.size == (500, 500)
    left, top, right, bottom = image.convert("L").point(lambda value: 255 * (value < 128)).getbbox()
    box = passage.box
    assert box[0] - 2 <= left and box[1] - 2 <= top and right <= box[2] + 2 and bottom <= box[3] + 2
    assert (right - left) * (bottom - top) > 0.5 * (box[2] - box[0]) * (box[3] - box[1])
    marked = image_of.open(io.BytesIO(page_image(tmp_path / "a.pdf", 1, box, width=500)))
    assert marked.getpixel((int(box[0]), int(box[1]))) != (255, 255, 255) == marked.getpixel((2, 2))


def test_a_page_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf([text(72, 700, "Iron.")]))
    (tmp_path / "b.pdf").write_bytes(b"no PDF")
    for name, reason in (("a.pdf", "the document has 1 pages"), ("b.pdf", "cannot be shown"), ("c.pdf", "not there any more")):
        with pytest.raises(RequestError, match=reason):
            page_image(tmp_path / name, 2)
