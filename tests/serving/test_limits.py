"""The limits of a server: their table, and requests at each of them and at ten times as much while a second client asks."""

from __future__ import annotations

import asyncio
import json
import threading
from itertools import product
from pathlib import Path

import httpx
import pytest
import torch

from bessemer.serving.app import create_app
from bessemer.serving.config import LIMITS
from bessemer.serving.openai.protocol import ChatRequest, CompletionRequest
from bessemer.serving.openai.vllm_routes import DetokenizeRequest
from bessemer.serving.responses.protocol import ResponsesRequest
from bessemer.serving.runtime.bodies import ApiError, Body, read_request
from bessemer.tokenization.chat import ChatEncoder
from bessemer.tokenization.tokenizer import Tokenizer
from tests.cases import slow_but
from tests.serving.engine import FakeEngine
from tests.serving.limit_cases import CASES, FACTORS, OF_MANY, case_of, long_prompt, send_beside_another
from tests.serving.running import babbling_engine, servers

#: Tested on every run: ten times as much as each limit allows, and what is most work of what is allowed.
USUAL = {*product(CASES, FACTORS[1:]), *product(("ANSWERS", "VALUES"), FACTORS)}
#: Seconds in which a second client is answered, on a machine that does much else.
_PATIENCE = 5.0


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The address of a server, and the most completions of one request to it."""
    made: list = []
    with servers() as start:
        url = start(babbling_engine(tmp_path_factory.mktemp("limits")), made=made)
        yield url, made[0]._served.worker.most_at_once


def test_the_table_of_limits_is_that_of_the_code():
    page = Path(__file__).parents[2].joinpath("docs", "serving.md").read_text(encoding="utf-8")
    _, _, table = page.partition("| limit | the most | beyond it | set by |\n|---|---|---|---|\n")
    rows = table.partition("\n\n")[0].splitlines()
    assert rows == [limit.row for limit in LIMITS.values()]


def test_each_limit_is_sent_to_a_server_or_is_of_many_requests():
    assert CASES.keys() | OF_MANY == LIMITS.keys() and not CASES.keys() & OF_MANY


@pytest.mark.parametrize(("name", "factor"), slow_but(USUAL, product(CASES, FACTORS)))
def test_a_request_at_a_limit_keeps_nobody_waiting(running, name, factor):
    url, most_at_once = running
    seen = asyncio.run(send_beside_another(url, "tiny", case_of(name, factor, "tiny", most_at_once)))
    assert max(seen.statuses) < 500, seen
    assert set(seen.others) == {200}, seen
    assert seen.health < _PATIENCE and seen.chat < _PATIENCE, seen
    if factor > 1 and name != "ASIDE":
        assert set(seen.statuses) <= {400, 413}, seen


def test_seven_megabytes_of_words_are_refused_before_they_are_encoded(running):
    url, _ = running
    seen = asyncio.run(send_beside_another(url, "tiny", long_prompt("tiny")))
    assert seen.statuses == [400] and set(seen.others) == {200}, seen
    assert seen.health < _PATIENCE and seen.chat < _PATIENCE, seen


def refusal(kind: type[Body], body: bytes) -> str:
    with pytest.raises(ApiError) as refused:
        read_request(kind, body)
    assert refused.value.status == 400 and len(str(refused.value)) < 1100
    return str(refused.value)


def test_the_check_of_a_list_ends_at_its_first_wrong_item():
    body = b'{"tokens": [' + b"-1," * 300_000 + b"-1]}"
    assert refusal(DetokenizeRequest, body) == "invalid 'tokens[0]': Input should be greater than or equal to 0"
    with pytest.raises(ValueError) as caught:
        DetokenizeRequest.model_validate({"tokens": [-1] * 1000})
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, '"logit_bias": {' + ", ".join(f'"{place}": 1000' for place in range(100_000)) + "}"),
        (CompletionRequest, '"prompt": [' + "[1], " * 40_000 + '"a"]'),
        (CompletionRequest, '"prompt": "a", ' + ", ".join(f'"x{place}": 1' for place in range(100_000))),
        (CompletionRequest, '"prompt": "a", "' + "x" * 2_000_000 + '": 1'),
        (ChatRequest, '"messages": [' + '{"role": "user"}, ' * 40_000 + '{"role": "user"}]'),
        (ResponsesRequest, '"input": "a", "metadata": {' + ", ".join(f'"x{place}": 1' for place in range(100_000)) + "}"),
    ],
)
def test_much_that_is_wrong_is_refused_in_one_short_line(kind, body):
    assert refusal(kind, ('{"model": "tiny", ' + body + "}").encode())


def test_values_in_texts_are_not_counted():
    text = "[{,\\" * 600_000
    asked = json.dumps({"model": "tiny", "prompt": text, "stop": ['"']}).encode()
    assert read_request(CompletionRequest, asked).prompt == [text]
    assert "1,000,000 values" in refusal(CompletionRequest, asked[:-1] + b', "user": [' + b'"[",' * 1_000_000 + b"1]}")
    assert "50,000 lists and objects" in refusal(CompletionRequest, asked[:-1] + b', "user": [' + b"[]," * 50_000 + b"1]}")


def test_a_large_body_is_parsed_beside_the_event_loop(start, monkeypatch):
    parsed = []

    def parse(kind, body):
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        parsed.append(len(body))
        return read_request(kind, body)

    monkeypatch.setattr("bessemer.serving.runtime.bodies.read_request", parse)
    asked = {"model": "tiny", "prompt": "a", "user": "x" * 100_000}
    assert httpx.post(start(FakeEngine()) + "/v1/completions", json=asked).status_code == 200
    assert len(parsed) == 1 and parsed[0] > 100_000


def test_a_prompt_that_fits_no_context_is_never_encoded(running, monkeypatch):
    url, _ = running
    encoded = []
    encode, encode_chat = Tokenizer.encode, ChatEncoder.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, *more: encoded.append(len(text)) or encode(self, text, *more))
    monkeypatch.setattr(
        ChatEncoder,
        "encode",
        lambda self, segments: encoded.append(sum(len(one.text) for one in segments)) or encode_chat(self, segments),
    )
    text = "a word " * 100_000
    for path, body in {
        "/v1/completions": {"prompt": ["a", text]},
        "/v1/embeddings": {"input": text},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/responses": {"input": text},
        "/v1/messages": {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}], "max_tokens": 1},
    }.items():
        answer = httpx.post(url + path, json={"model": "tiny", **body}, timeout=30)
        assert answer.status_code == 400 and "context is 512 tokens" in answer.text, answer.text
    assert encoded == [1]


def test_texts_are_embedded_in_parts_as_large_as_are_computed_at_once(start, tmp_path, monkeypatch):
    engine = babbling_engine(tmp_path, max_num_seqs=4)
    embed, sizes = engine.embed, []
    monkeypatch.setattr(engine, "embed", lambda prompts, **more: sizes.append(len(prompts)) or embed(prompts, **more))
    texts = [f"text {place}" for place in range(10)]
    data = httpx.post(start(engine, max_waiting=0) + "/v1/embeddings", json={"model": "tiny", "input": texts}).json()["data"]
    assert sizes == [4, 4, 2] and [one["index"] for one in data] == list(range(10))
    whole = embed([engine.tokenizer.encode(text) for text in texts])
    assert torch.allclose(torch.tensor([one["embedding"] for one in data]), whole, atol=1e-5)


def test_work_that_is_no_completion_is_done_by_two_threads_at_once():
    served = create_app(FakeEngine(), "tiny").state.served
    lock, at_once, most = threading.Lock(), 0, 0
    both = threading.Barrier(2, timeout=20)

    def work() -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        both.wait()
        with lock:
            at_once -= 1

    async def many() -> None:
        await asyncio.gather(*(served.run_in_thread(work) for _ in range(8)))

    asyncio.run(many())
    assert most == 2
