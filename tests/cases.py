"""Cases of parametrised tests, of which `make test` runs the most telling ones and `make test-all` every one."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """A case that only `make test-all` runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def in_turn(first: Iterable, second: Iterable) -> list:
    """All pairs of the two: each of the first beside one of the second in turn, and the other pairs slow.

    What is marked slow in the second is slow in every pair.
    """
    firsts, seconds = list(first), list(second)
    usual = [one for one in seconds if not hasattr(one, "marks")]
    pairs = []
    for number, one in enumerate(firsts):
        for other in seconds:
            values = other.values[0] if hasattr(other, "values") and hasattr(other, "marks") else other
            chosen = other is usual[number % len(usual)]
            name = f"{getattr(one, '__name__', one)}-{values}"
            pairs.append(pytest.param(one, values, id=name) if chosen else slow(one, values, id=name))
    return pairs


def slow_but(usual: Container, cases: Iterable) -> list:
    """The cases, each one value or a tuple of them, with those that are not among the usual ones marked slow."""
    return [case if case in usual else slow(*case) if isinstance(case, tuple) else slow(case) for case in cases]
