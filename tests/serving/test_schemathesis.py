"""Requests that a property tester makes of the description: no failure of the server, and answers as described."""

from __future__ import annotations

import pytest

from bessemer.serving.openapi import OPERATIONS
from tests.serving.engine import FakeEngine
from tests.serving.running import servers

pytestmark = pytest.mark.peer(name="clients")


@pytest.fixture(scope="module")
def url():
    with servers() as start:
        yield start(FakeEngine(), max_waiting=8)


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda value: value)
def test_any_request_of_the_description_is_answered_as_it_says(url, path, method):
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = schema[path][method]

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def check(case):
        answer = case.call(timeout=30)
        assert answer.status_code < 500 or (answer.status_code == 503 and "retry-after" in answer.headers), answer.text
        case.validate_response(
            answer,
            checks=[
                schemathesis.checks.load_all_checks() or check
                for check in (
                    schemathesis.specs.openapi.checks.status_code_conformance,
                    schemathesis.specs.openapi.checks.content_type_conformance,
                    schemathesis.specs.openapi.checks.response_schema_conformance,
                )
            ],
        )

    check()
