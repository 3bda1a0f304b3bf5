"""Every field of every dialect with values that nobody means: a refusal or an answer, never a failure of the server."""

from __future__ import annotations

import httpx
import pytest

from bessemer.inference.engine import Engine
from bessemer.model.storage.folder import save_model
from bessemer.serving.anthropic.protocol import MessagesRequest
from bessemer.serving.ollama.protocol import ChatBody
from bessemer.serving.openai.protocol import ChatRequest, CompletionRequest
from bessemer.serving.responses.protocol import ResponsesRequest
from bessemer.webapp.app import WebSettings, web_pages
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer
from tests.serving.running import servers

MESSAGES = '"messages": [{"role": "user", "content": "a"}]'
#: Of each path, what it reads and the shortest request.
DIALECTS = {
    "/v1/chat/completions": (ChatRequest, f'{MESSAGES}, "max_completion_tokens": 1'),
    "/v1/completions": (CompletionRequest, '"prompt": "a", "max_tokens": 1'),
    "/v1/messages": (MessagesRequest, f'{MESSAGES}, "max_tokens": 1'),
    "/v1/responses": (ResponsesRequest, '"input": "a", "max_output_tokens": 1'),
    "/api/chat": (ChatBody, f'{MESSAGES}, "options": {{"num_predict": 1}}'),
}
VALUES = ("-1", "1180591620717411303424", "NaN")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile")
    tokenizer = write_small_tokenizer(path / "tokenizer")
    save_model(random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE)), path / "model", tokenizer=tokenizer)
    return Engine(path / "model", device="cpu")


@pytest.fixture(scope="module")
def hostile_server(engine, tmp_path_factory):
    """A client of a server with its pages, which keep feedback."""
    settings = WebSettings(feedback=tmp_path_factory.mktemp("feedback"))
    with servers() as start, httpx.Client(base_url=start(engine, web_pages(settings)), timeout=30) as client:
        yield client


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


@pytest.mark.parametrize("half", [r"\ud800", r"\uDFFF", r"a\ud800b"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", '"model": "HALF", "messages": [{"role": "user", "content": "a"}]'),
        ("/v1/chat/completions", '"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "HALF"}]'),
        ("/v1/chat/completions", f'"model": "tiny", "max_tokens": 1, "cache_salt": "HALF", {MESSAGES}'),
        ("/v1/chat/completions", f'"model": "tiny", "max_tokens": 1, "HALF": 1, {MESSAGES}'),
        ("/v1/completions", '"model": "tiny", "max_tokens": 1, "prompt": "a", "stop": ["HALF"]'),
        ("/v1/messages", f'"model": "HALF", "max_tokens": 1, {MESSAGES}'),
        ("/v1/responses", '"model": "tiny", "max_output_tokens": 1, "input": "a", "metadata": {"a": "HALF"}'),
        ("/v1/responses", '"model": "tiny", "max_output_tokens": 1, "input": "a", "metadata": {"HALF": "a"}'),
        ("/v1/responses", '"model": "tiny", "max_output_tokens": 1, "input": "a", "previous_response_id": "HALF"'),
        ("/v1/embeddings", '"model": "HALF", "input": "a"'),
        ("/tokenize", '"model": "HALF", "prompt": "a"'),
        ("/feedback", '"prompt": [{"role": "user", "content": "HALF"}], "chosen": "HALF", "rejected": "b"'),
    ],
)
def test_half_of_a_character_is_refused_wherever_it_stands(hostile_server, path, body, half):
    answer = hostile_server.post(path, content="{" + body.replace("HALF", half) + "}")
    assert answer.status_code == 400 and "half of a character" in answer.text, answer.text


def test_both_halves_of_a_character_are_one(hostile_server):
    asked = f'{{"model": "tiny", "max_output_tokens": 1, "input": "{chr(92)}ud83d{chr(92)}ude00", "metadata": {{"a": "😀"}}}}'
    assert hostile_server.post("/v1/responses", content=asked.encode()).json()["metadata"] == {"a": "😀"}


def test_half_of_a_character_in_bytes_is_no_json(hostile_server):
    asked = b'{"model": "' + "\ud800".encode("utf-8", "surrogatepass") + b'", "prompt": "a"}'
    assert hostile_server.post("/v1/completions", content=asked).status_code == 400
