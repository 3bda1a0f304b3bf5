"""The report: whole, escaped, alone."""

from __future__ import annotations

import dataclasses
import html
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from bessemer.core.metrics import LOSSY_NOTE
from bessemer.core.report import ReportData, Section, Text
from bessemer.views.report import render_report
from tests.views.sample_run import HOSTILE, run_of, sample_metrics, sample_records, sample_run

_VOID = {"meta", "br", "hr", "img", "input", "link"}


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(sample_run())


class _Reader(HTMLParser):
    """Collects what a browser would: elements, ids, references; checks that elements close in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in _VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
                self.references.append(value)
            assert not name.startswith("on")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_hostile_text_is_shown_and_never_run(page):
    read = _Reader(page)
    assert "script" not in read.tags
    assert "<script" not in page
    assert read.text.count(HOSTILE) > 10


def test_page_asks_nothing_of_a_network(page):
    read = _Reader(page)
    assert read.references and all(reference.startswith("#") for reference in read.references)
    assert not {"link", "img", "iframe", "object", "embed"} & read.tags
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_elements_close_and_ids_are_unique_and_references_lead_somewhere(page):
    read = _Reader(page)
    assert not read.open
    assert len(read.ids) == len(set(read.ids))
    assert {reference[1:] for reference in read.references} <= set(read.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(read.ids)


def test_same_run_gives_the_same_bytes(page):
    sample_run.cache_clear()
    assert render_report(sample_run()) == page


def test_every_drawing_is_whole_and_says_what_it_shows(page):
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    # bits per byte, loss, learning rate, speed; the loss of the fine-tuning; four scores; two of the red team
    assert len(drawings) == 11
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.attrib["role"] == "img"
        title = root.find("{http://www.w3.org/2000/svg}title")
        assert root.attrib.get("aria-label") if title is None else title.text


def test_drawings_take_their_colours_from_the_page(page):
    for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert not re.search(r"(stroke|fill): #", drawing)


def test_held_in_figures_are_called_memorised(page):
    text = " ".join(_Reader(page).text.split())
    assert "Exact match held in (memorised)" in text
    assert "Held-in questions, memorised" in text
    assert "held in: memorised" in text


def test_baselines_stand_beside_the_curve(page):
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    drawing = next(drawing for drawing in drawings if "Bits per byte" in drawing)
    for baseline in ("Witten–Bell 5-gram 1.96", "xz −9 1.85"):
        assert baseline in drawing


def test_what_is_absent_has_no_section():
    titles = ["The pipeline", "Data", "Tokenizer", "Model", "Pretraining", "Fine-tuning", "Evaluation", "Environment", "Recipe"]
    whole = _Reader(render_report(sample_run()))
    assert all(f"#{title}" in whole.references for title in ("pipeline", "data", "recipe"))
    bare = render_report(ReportData(name="bare", sections=[Section("Model", [Text("small")])]))
    assert [title for title in titles if f">{title}</h2>" in bare] == ["Model"]
    assert "<h2" not in render_report(ReportData(name="empty"))


def test_training_that_has_only_begun_is_a_section_without_curves():
    page = render_report(run_of({"pretrain": {"steps": 0}}))
    assert "Pretraining</h2>" in page and "<svg" not in page


def test_the_tokenizer_is_shown_by_kind_of_text_and_beside_the_simplest(page):
    text = _Reader(page).text
    for expected in ("Every word a token", "This tokenizer", "Tokens, English = 1", "(1.00)", "40.0 %", "not exactly"):
        assert expected in text


def test_bits_per_byte_of_a_lossy_tokenizer_carry_a_warning(page):
    metrics = sample_metrics()
    assert LOSSY_NOTE not in html.unescape(page)
    metrics["tokenize"]["lossless"] = False
    lossy = render_report(dataclasses.replace(run_of(metrics, sample_records()), sentences=()))
    assert html.unescape(lossy).count(LOSSY_NOTE) == 2  # where it is trained and where it is evaluated
    assert "can be compared with any other model" not in lossy


def test_the_report_shows_the_quantised_model_beside_the_one_that_it_was_made_from():
    page = render_report(sample_run())
    section = page[page.index('id="quantisation"') :]
    for text in ("1.3 MB", "1.5031", "after: int8, rtn", "410", "99.5%"):
        assert text in section, text


def test_sections_of_one_title_have_anchors_of_their_own():
    page = render_report(ReportData(name="twice", sections=[Section("Model", [Text("one")]), Section("Model", [Text("two")])]))
    assert re.findall(r'<section id="([^"]*)"', page) == ["model", "model-2"]
