"""The description of the API: it names every route, and what it says of bodies is what is read."""

from __future__ import annotations

import re

import httpx
import jsonschema
import pytest
from fastapi import FastAPI

from bessemer.serving.app import create_app
from bessemer.serving.openapi import OPERATIONS, description
from tests.serving.engine import FakeEngine
from tests.serving.running import servers


@pytest.fixture(scope="module")
def document():
    return description()


@pytest.fixture
def url():
    with servers() as start:
        yield start(FakeEngine())


def routes(app: FastAPI) -> set[tuple[str, str]]:
    """Path and method of every route, parameters by name alone."""
    described = FastAPI.openapi(app)["paths"]
    return {(re.sub(r":path\}", "}", path), method) for path, methods in described.items() for method in methods}


def test_every_route_is_described_and_nothing_else():
    own = {("/", "get"), ("/", "head")}
    assert routes(create_app(FakeEngine(), "tiny")) - own == set(OPERATIONS)


def test_references_lead_somewhere_and_names_are_unique(document):
    text = str(document)
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in document["components"]["schemas"]
    identities = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(identities) == len(set(identities)) == len(OPERATIONS)


def test_it_is_served_and_needs_no_key():
    with servers() as start:
        url = start(FakeEngine(), api_key="secret")
        assert httpx.get(f"{url}/openapi.json").json()["openapi"] == "3.1.0"
        assert httpx.get(f"{url}/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "abc"}]}),
        ("/v1/completions", {"model": "tiny", "prompt": "abc", "n": 2}),
        ("/v1/responses", {"model": "tiny", "input": "abc"}),
        ("/v1/messages", {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 4}),
        ("/v1/messages/count_tokens", {"model": "tiny", "messages": [{"role": "user", "content": "abc"}]}),
        ("/tokenize", {"prompt": "abc"}),
        ("/detokenize", {"tokens": [97, 98]}),
    ],
)
def test_an_answer_and_an_error_are_what_the_description_says(url, document, path, body):
    responses = document["paths"][path]["post"]["responses"]
    answer = httpx.post(f"{url}{path}", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    jsonschema.validate(answer.json(), responses["200"]["content"]["application/json"]["schema"])
    refused = httpx.post(f"{url}{path}", json={**body, "no_such_field": 1})
    assert refused.status_code == 400
    jsonschema.validate(refused.json(), responses["default"]["content"]["application/json"]["schema"])
