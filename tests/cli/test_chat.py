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


def test_commands_are_listed_and_what_is_none_is_not_asked(engine, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/help\n/?\n/frob\n/bye\nWho?\n"))
    monkeypatch.setattr(engine, "prepare", lambda *given, **options: pytest.fail("the model was asked"))
    converse(engine, SamplingParams(), [])
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["/new", "/help", "/quit"] * 2
    assert err == "there is no command /frob; /help lists all commands\n"


def test_a_question_may_begin_with_a_path(engine, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/etc/hosts\n/new line?\n"))
    converse(engine, SamplingParams(max_tokens=1), [])
    out, err = capsys.readouterr()
    assert err == "" and len(out.splitlines()) >= 2
