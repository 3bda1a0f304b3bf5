"""The suite has the same tests under the same ids whenever and wherever it is collected: side by side, workers compare them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def collected(hash_seed: str) -> list[str]:
    """The ids of all tests, slow ones too, as a new process finds them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "", "--assert=plain"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "tests"]
    found = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONHASHSEED": hash_seed}, capture_output=True, encoding="utf-8", check=True
    )
    return [line for line in found.stdout.splitlines() if "::" in line]


# the workers of a run, each with a hash order of its own, compare what they collect at every run
@pytest.mark.slow
def test_two_collections_in_other_seconds_and_hash_orders_give_the_same_ids():
    # one after the other: each takes seconds, so that a clock in an id would show
    first, second = collected("1"), collected("2")
    assert first == second
    assert len(first) == len(set(first)) > 1000
    assert not [name for name in first if " at 0x" in name]  # an object without a name of its own, by its address
