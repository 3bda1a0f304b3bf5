"""Requests that a property tester makes of the description: no failure of the server, and answers as described."""

from __future__ import annotations

import pytest

from bessemer.serving.openapi import OPERATIONS
from tests.serving.running import babbling_engine, servers

pytestmark = pytest.mark.peer(name="clients")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    made = babbling_engine(tmp_path_factory.mktemp("served"), 256)
    with servers() as start:
        yield start(made, max_waiting=8)


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
        waits = answer.status_code == 503 and "retry-after" in answer.headers
        cannot = answer.status_code == 501 and OPERATIONS[path, method].unsupported
        assert answer.status_code < 500 or waits or cannot, answer.text
        case.validate_response(answer, checks=[status_code_conformance, content_type_conformance, response_schema_conformance])

    check()
