"""A model of this machine as one that is asked in chats."""

from types import SimpleNamespace

import pytest
import torch

from bessemer.core.chat_client import CutText
from bessemer.inference.chat import EngineChat
from bessemer.inference.engine import Engine, SamplingParams
from tests.inference.models import small_decoder, small_tokenizer


@pytest.fixture
def engine(tmp_path):
    return Engine(small_decoder("dense"), small_tokenizer(tmp_path))


def test_answers_are_the_engines_and_a_prompt_without_room_has_none(engine):
    said = [{"role": "user", "content": "why"}]
    chat = EngineChat(engine, max_tokens=5)
    expected = engine.chat(said, SamplingParams(max_tokens=5, temperature=0.0)).text
    assert chat.ask([said, "long " * 200, "why"]) == [expected, "", expected]
    sampling = EngineChat(engine, max_tokens=8, temperature=1.0)
    first, second, again = sampling.ask(["why"] * 3, seeds=[1, 2, 1])
    assert first == again != second


def test_an_answer_that_was_cut_is_told_apart_from_one_that_ended(engine, monkeypatch):
    completions = [SimpleNamespace(text=f"{reason}.", finish_reason=reason) for reason in ("stop", "length")]
    monkeypatch.setattr(engine, "generate", lambda *_: completions)
    answers = EngineChat(engine).ask(["why", "how", "long " * 200])
    assert answers == ["stop.", "length.", ""] and [isinstance(one, CutText) for one in answers] == [False, True, False]


def test_an_option_has_the_probability_of_its_tokens(engine):
    prompt, options = "A or B?", ("A", "B")
    (found, none) = EngineChat(engine).choose([prompt, "long " * 200], options)
    ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    (a,), (b,) = (engine.tokenizer.encode(option, add_bos=False) for option in options)
    with torch.no_grad():
        logits = engine.model(torch.tensor([ids]))[0, -1]
    assert found == pytest.approx(logits[[a, b]].softmax(0).tolist(), abs=1e-5) and none is None
