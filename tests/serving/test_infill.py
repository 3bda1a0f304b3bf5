"""llama.cpp's `/infill`, as editors' plug-ins call it."""

from __future__ import annotations

import json

import httpx
import pytest

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.storage.folder import save_model
from bessemer.tokenization.control_tokens import FILL_IN_THE_MIDDLE_SPELLINGS
from bessemer.tokenization.existing import add_tokens
from bessemer.tokenization.prompts import infill_prompt
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

#: As llama.vim sends it.
BODY = {
    "input_prefix": "the end\n",
    "input_suffix": "\nthin",
    "prompt": "in ",
    "n_predict": 6,
    "temperature": 0,
    "samplers": ["top_k", "infill"],
    "cache_prompt": True,
    "n_indent": 4,
    "t_max_predict_ms": 500,
}


@pytest.fixture
def engine_of(tmp_path):
    """An engine of a small model whose tokenizer has these control tokens too."""

    def made(*special, **settings):
        write_small_tokenizer(tmp_path / "plain")
        added = add_tokens(tmp_path / "plain", tmp_path / "fim", special_tokens=list(special)).added
        shape = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE + len(added))
        save_model(random_decoder(shape), tmp_path / "model", tokenizer=tmp_path / "fim")
        return Engine(tmp_path / "model", device="cpu", config=EngineConfig(**settings))

    return made


def filled(engine, tokens, most=6):
    return engine.generate([tokens], SamplingParams(max_tokens=most, temperature=0))[0]


def test_the_text_at_the_cursor_is_that_of_the_engine_whole_and_streamed(engine_of, start):
    engine = engine_of(*FILL_IN_THE_MIDDLE_SPELLINGS[0])
    url = start(engine) + "/infill"
    prompt = infill_prompt(engine.tokenizer, "the end\nin ", "\nthin")
    expected = filled(engine, prompt)
    whole = httpx.post(url, json=BODY).json()
    assert (whole["content"], whole["tokens_evaluated"]) == (expected.text, len(prompt))
    assert whole["stop"] is True and whole["tokens_predicted"] == expected.completion_tokens
    assert whole["stop_type"] == ("limit" if expected.finish_reason == "length" else "eos")
    events = httpx.post(url, json=BODY | {"stream": True}).text.removesuffix("\n\n").split("\n\n")
    parts = [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]
    assert "".join(part["content"] for part in parts) == expected.text
    assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]
    wanted = ["content", "timings/prompt_n", "nothing/there"]
    some = httpx.post(url, json=BODY | {"response_fields": wanted}).json()
    assert set(some) == {"content", "timings/prompt_n"} and some["content"] == expected.text


def test_other_files_stand_before_and_none_predicted_warms_the_cache(engine_of, start):
    engine = engine_of(*FILL_IN_THE_MIDDLE_SPELLINGS[0], "<|file_sep|>", block_size=4)
    url, tokenizer = start(engine) + "/infill", engine.tokenizer
    extra = [{"filename": "a.py", "text": "the thin"}, {"text": "end"}]
    frame = infill_prompt(tokenizer, "the end\nin ", "\nthin")
    separator, begin = tokenizer.control_id("<|file_sep|>"), len(tokenizer.begin_ids)
    files = [token for text in ("a.py\nthe thin\n", "end\n") for token in [separator, *tokenizer.encode(text, add_bos=False)]]
    prompt = [*frame[:begin], *files, *frame[begin:]]
    warmed = httpx.post(url, json=BODY | {"input_extra": extra, "n_predict": 0}).json()
    assert (warmed["content"], warmed["tokens_predicted"], warmed["tokens_evaluated"]) == ("", 0, len(prompt))
    answer = httpx.post(url, json=BODY | {"input_extra": extra}).json()
    assert answer["content"] == filled(engine, prompt).text and answer["tokens_cached"] >= len(prompt) - 4


def test_what_is_too_long_is_cut_farthest_from_the_cursor(engine_of, start):
    engine = engine_of(*FILL_IN_THE_MIDDLE_SPELLINGS[0], max_model_len=48)
    url = start(engine) + "/infill"
    before, after = "".join(f"{n} " for n in range(100)), "".join(f" {n}" for n in range(100))
    body = BODY | {"input_prefix": before, "input_suffix": after, "prompt": "", "input_extra": [{"text": "the end"}]}
    answer = httpx.post(url, json=body).json()
    assert answer["tokens_evaluated"] == 48 - 6
    room = 48 - 6 - len(infill_prompt(engine.tokenizer, "", ""))
    tokens = [engine.tokenizer.encode(text, add_bos=False) for text in (before, after)]
    kept = int(room * 0.75)
    frame = infill_prompt(engine.tokenizer, "", "")
    prefix, suffix, middle = frame[-3:]
    prompt = [*frame[:-3], prefix, *tokens[0][-kept:], suffix, *tokens[1][: room - kept], middle]
    assert answer["content"] == filled(engine, prompt).text


def test_a_model_without_the_control_tokens_and_bad_bodies_are_refused(engine_of, start):
    url = start(engine_of()) + "/infill"
    refused = httpx.post(url, json=BODY)
    assert refused.status_code == 501 and "needs the control tokens" in refused.json()["error"]["message"]
    for change in ({"input_prefix": None}, {"n_predict": -2}, {"n_predict": 2**63}, {"input_extra": "x"}, {"what": 1}):
        assert httpx.post(url, json=BODY | change).status_code in (400, 501), change
