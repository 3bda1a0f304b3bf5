"""The other extractors. A function that hangs stands in for trafilatura on a hostile page."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from bessemer.core.environment import install_extra
from bessemer.core.errors import ConfigError
from bessemer.data import limited
from bessemer.data.extraction import extract as peers
from bessemer.data.extraction.extract import NoAnswerError, Trafilatura, extract, union
from tests.data.extraction.test_extract import ARTICLE, SENTENCES


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    extractor = Trafilatura(time_limit=0.2, processes=2, function="tests.data.extraction.stand_in:stand_in_text")
    yield extractor
    extractor.close()


@pytest.mark.parametrize(
    ("page", "kind", "why"),
    [
        ("hang", "extraction_timeouts", "trafilatura: took more than 0.2 seconds"),
        ("die", "extraction_failures", "trafilatura: its parser crashed or ran out of memory"),
        ("fail", "extraction_failures", "trafilatura: RecursionError: too deep"),
    ],
)
def test_a_page_that_gets_no_answer_is_given_up_with_the_reason_and_the_next_one_is_read(stand_in, page, kind, why):
    assert stand_in("one") == "text of one"
    with pytest.raises(NoAnswerError, match=why) as raised:
        stand_in(page)
    assert raised.value.kind == kind
    assert stand_in("two") == "text of two"


def test_what_a_page_may_take_is_processor_time_and_not_time_on_the_clock(stand_in, monkeypatch):
    monkeypatch.setattr(limited, "_CLOCK_FACTOR", 1000)
    assert stand_in("wait 0.5") == "text of wait 0.5"


def test_two_pages_at_once_are_read_by_two_processes(stand_in, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(stand_in, [f"r {tmp_path / 'pipe'}", f"w {tmp_path / 'pipe'}"])
    assert one != other


def test_one_page_after_the_other_is_read_by_one_process(stand_in):
    assert stand_in("pid") == stand_in("pid")


def test_there_are_as_many_processes_as_cores(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    monkeypatch.setattr(peers, "usable_cores", lambda: 7)
    assert len(Trafilatura()._helpers) == 7


def test_a_page_larger_than_a_pipe_holds_passes(stand_in):
    page = "x" * 1_000_000
    assert stand_in(page) == "text of " + page


def test_without_trafilatura_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape(install_extra("trafilatura"))):
        Trafilatura()


def test_resiliparse_extracts():
    assert SENTENCES[0] in extract(ARTICLE, extractor="resiliparse")


def test_trafilatura_extracts_in_a_process_of_its_own():
    pytest.importorskip("trafilatura")
    assert SENTENCES[0] in extract(ARTICLE, extractor="trafilatura")
    text = extract(ARTICLE, extractor="union")
    assert all(text.count(sentence) == 1 for sentence in SENTENCES)


@pytest.mark.parametrize(
    ("ours", "theirs", "both"),
    [
        ("# T\n\na one\n\nc three", "a one\nb two\nc three", "# T\n\na one\n\nb two\n\nc three"),
        ("- a\n- b", "a\nb", "- a\n- b"),
        ("a", "zero\na\nlast\nlast", "zero\n\na\n\nlast"),
        ("a b", "A, b!", "a b"),
        ("", "x\ny", "x\n\ny"),
        ("x", "", "x"),
        ("", "", ""),
    ],
)
def test_a_union_has_every_paragraph_once_and_in_order(ours, theirs, both):
    assert union(ours, theirs) == both
