"""`bessemer chat` on a small model in memory."""

import io

import pytest

from bessemer.cli.chat import converse
from bessemer.inference.engine import Engine, SamplingParams
from tests.inference.models import small_decoder, small_tokenizer


@pytest.fixture
def engine(tmp_path):
    """A context of 160 tokens."""
    return Engine(small_decoder("dense"), small_tokenizer(tmp_path))


def test_the_oldest_question_is_forgotten_when_the_context_is_full(engine, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who was it?\n" * 4 + "/new\nWhy?\n"))
    converse(engine, SamplingParams(max_tokens=24, temperature=0), [], system="Be brief.", speed=True)
    out, err = capsys.readouterr()
    assert err.count("(the context is full: the oldest question and answer are forgotten)") >= 1
    assert err.count(" tokens: the first after ") == 5
    first = engine.chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who was it?"}],
        SamplingParams(max_tokens=24, temperature=0),
    )
    assert out.startswith(f"{first.text}\n")
