"""Cases of parametrised tests, of which `make test` runs the most telling ones and `make test-all` every one."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """A case that only `make test-all` runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def slow_but(usual: Container, cases: Iterable) -> list:
    """The cases, each one value or a tuple of them, with those that are not among the usual ones marked slow."""
    return [case if case in usual else slow(*case) if isinstance(case, tuple) else slow(case) for case in cases]
