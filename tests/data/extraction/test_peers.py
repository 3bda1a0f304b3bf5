"""The other extractors. A process that hangs stands in for trafilatura on a hostile page."""

from __future__ import annotations

import sys

import pytest

from bessemer.core.errors import ConfigError
from bessemer.data.extraction import peers
from bessemer.data.extraction.extract import extract
from bessemer.data.extraction.peers import NoAnswerError, Trafilatura, union
from tests.data.extraction.test_extract import ARTICLE, SENTENCES

HANGS_ON_EVERY_SECOND_PAGE = """
import json, sys, time
count = 0
while len(size := sys.stdin.buffer.read(8)) == 8:
    asked = json.loads(sys.stdin.buffer.read(int.from_bytes(size, "big")))
    if asked["html"] == "hang":
        time.sleep(60)
    if asked["html"] == "die":
        sys.exit(1)
    if asked["html"] == "fail":
        body = json.dumps({"error": "RecursionError: too deep"}).encode()
        sys.stdout.buffer.write(len(body).to_bytes(8, "big") + body)
        sys.stdout.buffer.flush()
        continue
    body = json.dumps("text of " + asked["html"]).encode()
    sys.stdout.buffer.write(len(body).to_bytes(8, "big") + body)
    sys.stdout.buffer.flush()
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(HANGS_ON_EVERY_SECOND_PAGE)
    started = peers.subprocess.Popen
    monkeypatch.setattr(peers.subprocess, "Popen", lambda command, **kwargs: started([sys.executable, str(script)], **kwargs))
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    extractor = Trafilatura(time_limit=0.5)
    yield extractor
    extractor.close()


@pytest.mark.parametrize(
    ("page", "kind", "why"),
    [
        ("hang", "extraction_timeouts", "trafilatura took more than 0.5 s for this page"),
        ("die", "extraction_failures", r"trafilatura's process ended on this page \(EOFError\)"),
        ("fail", "extraction_failures", "trafilatura failed on this page: RecursionError: too deep"),
    ],
)
def test_a_page_that_gets_no_answer_is_given_up_with_the_reason_and_the_next_one_is_read(stand_in, page, kind, why):
    assert stand_in("one") == "text of one"
    with pytest.raises(NoAnswerError, match=why) as raised:
        stand_in(page)
    assert raised.value.kind == kind
    assert stand_in("two") == "text of two"


def test_a_page_larger_than_a_pipe_holds_passes(stand_in):
    page = "x" * 1_000_000
    assert stand_in(page) == "text of " + page


def test_without_trafilatura_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'bessemer\[trafilatura\]'"):
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
