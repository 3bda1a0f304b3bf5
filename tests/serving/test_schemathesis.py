"""Requests that a property tester makes of the description: no failure of the server, and answers as described."""

from __future__ import annotations

import pytest

from bessemer.inference.engine import Engine
from bessemer.model.folder import save_model
from bessemer.serving.openapi import OPERATIONS
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer
from tests.serving.running import servers

pytestmark = pytest.mark.peer(name="clients")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    tokenizer = write_small_tokenizer(path / "tokenizer")
    shape = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE, max_position_embeddings=256)
    save_model(random_decoder(shape), path / "model", tokenizer=tokenizer)
    with servers() as start:
        yield start(Engine(path / "model", device="cpu"), max_waiting=8)


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda value: value)
def test_any_request_of_the_description_is_answered_as_it_says(url, path, method):
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")

    @settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy())
    def check(case):
        # most names are of no model, which says little
        if isinstance(case.body, dict) and "model" in case.body and len(str(case.body["model"])) % 2:
            case.body["model"] = "tiny"
        answer = case.call(timeout=60)
        assert answer.status_code < 500 or (answer.status_code == 503 and "retry-after" in answer.headers), answer.text
        case.validate_response(answer, checks=[status_code_conformance, content_type_conformance, response_schema_conformance])

    check()
