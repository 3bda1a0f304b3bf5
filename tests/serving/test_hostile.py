"""Every field of every dialect with values that nobody means: a refusal or an answer, never a failure of the server."""

from __future__ import annotations

import httpx
import pytest

from bessemer.inference.engine import Engine
from bessemer.model.folder import save_model
from bessemer.serving.anthropic_protocol import MessagesRequest
from bessemer.serving.protocol import ChatRequest, CompletionRequest
from bessemer.serving.responses_protocol import ResponsesRequest
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

MESSAGES = '"messages": [{"role": "user", "content": "a"}]'
#: Of each path, what it reads and the shortest request.
DIALECTS = {
    "/v1/chat/completions": (ChatRequest, f'{MESSAGES}, "max_completion_tokens": 1'),
    "/v1/completions": (CompletionRequest, '"prompt": "a", "max_tokens": 1'),
    "/v1/messages": (MessagesRequest, f'{MESSAGES}, "max_tokens": 1'),
    "/v1/responses": (ResponsesRequest, '"input": "a", "max_output_tokens": 1'),
}
VALUES = ("-1", "1180591620717411303424", "NaN")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile")
    tokenizer = write_small_tokenizer(path / "tokenizer")
    save_model(random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE)), path / "model", tokenizer=tokenizer)
    return Engine(path / "model", device="cpu")


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=pytest.mark.slow if place else ()) for place, path in enumerate(DIALECTS)]
)
def test_no_value_of_a_field_makes_the_server_fail(engine, start, path):
    kind, rest = DIALECTS[path]
    fields = [name for name in kind.model_fields if name != "model"]
    with httpx.Client(base_url=start(engine), timeout=30) as client:
        # what is hostile below is the value
        assert client.post(path, content=f'{{"model": "tiny", {rest}}}').status_code == 200
        answers = {
            (name, value): client.post(path, content=f'{{"model": "tiny", {rest}, "{name}": {value}}}').status_code
            for name in fields
            for value in VALUES
        }
    assert not [asked for asked, status in answers.items() if status not in (200, 400, 404)]
    refused = {asked for asked, status in answers.items() if status in (400, 404)}
    assert {(name, "NaN") for name in fields} <= refused


@pytest.mark.parametrize(
    "content",
    [
        '{"model": "tiny", "messages": ' + "[" * 100_000,
        '{"model": "tiny", "messages": ' + '{"a":' * 100_000,
        b'{"model": "tiny", "prompt": "\xff"}',
        '{"model": "tiny", "prompt": "a", "stop": [' + '"x",' * 2000 + '"x"]}',
    ],
)
def test_what_is_nested_too_deep_or_no_text_or_too_much_is_refused(engine, start, content):
    assert httpx.post(start(engine) + "/v1/completions", content=content).status_code == 400


def test_a_schema_that_is_nested_too_deep_is_refused(engine, start):
    schema: dict = {"type": "object"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"a": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "response_format": form}
    answer = httpx.post(start(engine) + "/v1/chat/completions", json=asked)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "response_format"
