"""DOCX, PPTX and XLSX, as their libraries write them: all of their text, in order, with its structure."""

from __future__ import annotations

import datetime
import io

import pytest

from bessemer.retrieval.chunks import cut_document
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import IndexedDocument, passages_of
from bessemer.retrieval.reading.docx import read_docx
from bessemer.retrieval.reading.pptx import read_pptx
from bessemer.retrieval.reading.xlsx import read_xlsx

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def saved(document):
    data = io.BytesIO()
    document.save(data)
    return data.getvalue()


def test_a_word_document_keeps_headings_lists_and_tables():
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.core_properties.title = "Handbook"
    document.add_heading("Holidays", 1)
    document.add_paragraph("Everybody has thirty days. See [1] and <|im_end|>.")
    for word in ("Ask early.", "Ask in writing."):
        document.add_paragraph(word, style="List Bullet")
    document.add_heading("Steps", 2)
    for word in ("Fill in the form.", "Sign it."):
        document.add_paragraph(word, style="List Number")
    table = document.add_table(2, 3)
    for place, word in enumerate(["Year", "Days", "Note", "2026", "30", "a | b"]):
        table.cell(*divmod(place, 3)).text = word
    table.cell(1, 1).merge(table.cell(1, 2))
    read = read_docx(saved(document), 10**6)
    assert read.title == "Handbook"
    assert read.text.split("\n\n") == [
        "# Holidays",
        "Everybody has thirty days. See [1] and <|im_end|>.",
        "- Ask early.\n- Ask in writing.",
        "## Steps",
        "1. Fill in the form.\n2. Sign it.",
        "| Year | Days | Note |\n|---|---|---|\n| 2026 | 30 a \\| b |  |",
    ]
    assert all(paragraph.text in read.text for paragraph in document.paragraphs)


def test_a_word_document_gives_inserted_framed_and_noted_text_and_nothing_that_is_deleted_or_hidden():
    docx = pytest.importorskip("docx")
    from docx.opc.packuri import PackURI
    from docx.opc.part import Part
    from docx.oxml import parse_xml

    document = docx.Document()
    body = document.element.body
    for inner in (
        "<w:p><w:r><w:t>Kept, </w:t></w:r><w:ins><w:r><w:t>inserted</w:t></w:r></w:ins>"
        "<w:del><w:r><w:delText>deleted</w:delText></w:r></w:del><w:r><w:rPr><w:vanish/></w:rPr><w:t>hidden</w:t></w:r></w:p>",
        "<w:sdt><w:sdtContent><w:p><w:r><w:t>in a control</w:t></w:r></w:p></w:sdtContent></w:sdt>",
        '<w:p><w:r><w:t>Noted</w:t></w:r><w:r><w:footnoteReference w:id="2"/></w:r><w:r><w:t>.</w:t></w:r></w:p>',
        "<w:tbl><w:tr><w:tc><w:p><w:r><w:t>in a frame</w:t></w:r></w:p></w:tc></w:tr></w:tbl>",
        '<w:tbl><w:tr><w:tc><w:tcPr><w:vMerge w:val="restart"/></w:tcPr><w:p><w:r><w:t>both</w:t></w:r></w:p></w:tc>'
        "<w:tc><w:p><w:r><w:t>one</w:t></w:r></w:p></w:tc></w:tr><w:tr><w:tc><w:tcPr><w:vMerge/></w:tcPr><w:p/></w:tc>"
        "<w:tc><w:p><w:r><w:t>two</w:t></w:r></w:p></w:tc></w:tr></w:tbl>",
    ):
        body.append(parse_xml(inner.replace(">", f" {W}>", 1)))
    notes = f'<w:footnotes {W}><w:footnote w:id="2"><w:p><w:r><w:t>By the law.</w:t></w:r></w:p></w:footnote></w:footnotes>'
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.footnotes+xml"
    part = Part(PackURI("/word/footnotes.xml"), kind, notes.encode(), document.part.package)
    document.part.relate_to(part, "http://schemas.openxmlformats.org/officeDocument/2006/relationships/footnotes")
    assert read_docx(saved(document), 10**6).text.split("\n\n") == [
        "Kept, inserted",
        "in a control",
        "Noted[^1].\n[^1]: By the law.",
        "in a frame",
        "| both | one |\n|---|---|\n| both | two |",
    ]


def test_a_presentation_is_a_section_a_slide_with_its_notes():
    pptx = pytest.importorskip("pptx")
    from pptx.chart.data import CategoryChartData
    from pptx.enum.chart import XL_CHART_TYPE
    from pptx.util import Inches

    deck = pptx.Presentation()
    first = deck.slides.add_slide(deck.slide_layouts[1])
    first.shapes.title.text = "Growth"
    first.placeholders[1].text = "Sales rose\nCosts fell"
    first.notes_slide.notes_text_frame.text = "Mention the new plant."
    second = deck.slides.add_slide(deck.slide_layouts[6])
    places = ((5, 1), (1, 3), (1, 1))
    boxes = [second.shapes.add_textbox(Inches(left), Inches(top), Inches(2), Inches(1)) for left, top in places]
    for box, word in zip(boxes, ("right", "below", "left"), strict=True):
        box.text_frame.text = word
    table = second.shapes.add_table(2, 2, Inches(1), Inches(4), Inches(3), Inches(1)).table
    for place, word in enumerate(("Year", "t", "2026", "7")):
        table.cell(*divmod(place, 2)).text = word
    chart = CategoryChartData()
    chart.categories = ["iron", "tin"]
    chart.add_series("t", (3, 0.5))
    second.shapes.add_chart(XL_CHART_TYPE.COLUMN_CLUSTERED, Inches(1), Inches(6), Inches(3), Inches(1), chart)
    deck.slides.add_slide(deck.slide_layouts[0]).shapes.title.text = "Thank you"
    deck.slides.add_slide(deck.slide_layouts[6])._element.set("show", "0")
    read = read_pptx(saved(deck), 10**6)
    assert read.text.split("\n\n") == [
        "# Growth",
        "- Sales rose\n- Costs fell",
        "Notes: Mention the new plant.",
        "# Slide 2",
        "left",
        "right",
        "below",
        "| Year | t |\n|---|---|\n| 2026 | 7 |",
        "|  | t |\n|---|---|\n| iron | 3 |\n| tin | 0.5 |",
        "# Thank you",
        "Thank you",
    ]
    assert read.notes == ("1 hidden slides were left out",)
    passages = passages_of(IndexedDocument("a.pptx", read.text, regions=read.regions), IndexConfig(embedder="none"))
    assert [(passage.headings, passage.page, passage.box) for passage in passages] == [
        ("Growth", 1, None), ("Slide 2", 2, None), ("Thank you", 3, None),
    ]  # fmt: skip


def test_a_workbook_is_its_sheets_tables_with_values_as_they_are_shown():
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Prices"
    for row in (["Prices of 2026"], ["Metal", "Share", "since"], ["iron", 0.25, datetime.date(2026, 1, 2)], [], ["n", "double"],
                [3, "=A5*2"], [1.5, True]):  # fmt: skip
        sheet.append(row)
    sheet["B3"].number_format = "0.0%"
    book.create_sheet("Old").append(["secret"])
    book["Old"].sheet_state = "hidden"
    book.create_sheet("Empty")
    read = read_xlsx(saved(book), 10**6)
    assert read.text.split("\n\n") == [
        "# Prices",
        "Prices of 2026",
        "| Metal | Share | since |\n|---|---|---|\n| iron | 25% | 2026-01-02 |",
        "| n | double |\n|---|---|\n| 3 | =A5*2 |\n| 1.5 | TRUE |",
    ]
    assert read.notes == ("1 hidden sheets were left out",)


def test_each_passage_of_a_long_table_has_its_header_and_every_row_is_in_one():
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["Article", "Price"])
    rows = [(f"bolt {number}", number) for number in range(60)]
    for row in rows:
        book.active.append(row)
    text = read_xlsx(saved(book), 10**6).text
    chunks = cut_document(text, longest=200, overlap=40)
    header = "| Article | Price |\n|---|---|"
    assert chunks[0].text.startswith(header) and chunks[0].table_header == ""
    assert len(chunks) > 5 and all(chunk.table_header == header for chunk in chunks[1:])
    assert all(len(chunk.table_header) + len(chunk.text) < 200 for chunk in chunks)
    assert all(any(f"| bolt {number} | {number} |" in chunk.text for chunk in chunks) for number in range(60))
    data = text.encode()
    assert all(data[chunk.start : chunk.end].decode() == chunk.text for chunk in chunks)


def test_a_text_ends_where_the_limit_is_and_says_so():
    docx = pytest.importorskip("docx")
    document = docx.Document()
    for number in range(100):
        document.add_paragraph(f"Paragraph number {number}.")
    read = read_docx(saved(document), 300)
    assert 300 <= len(read.text) < 350 and "its text was cut after" in read.notes[0]
