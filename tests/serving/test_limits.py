"""The limits of a server: their table, and requests at each of them and at ten times as much while a second client asks."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from bessemer.serving.bodies import ApiError, Body, read_request
from bessemer.serving.limits import LIMITS
from bessemer.serving.protocol import ChatRequest, CompletionRequest
from bessemer.serving.responses_protocol import ResponsesRequest
from bessemer.serving.tokens import DetokenizeRequest
from tests.serving.engine import FakeEngine
from tests.serving.limit_cases import CASES, FACTORS, OF_MANY, case_of, long_prompt, send_beside_another
from tests.serving.running import babbling_engine, servers

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


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", CASES)
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


def test_the_check_of_a_list_ends_at_its_first_wrong_item(monkeypatch):
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

    monkeypatch.setattr("bessemer.serving.bodies.read_request", parse)
    asked = {"model": "tiny", "prompt": "a", "user": "x" * 100_000}
    assert httpx.post(start(FakeEngine()) + "/v1/completions", json=asked).status_code == 200
    assert len(parsed) == 1 and parsed[0] > 100_000
