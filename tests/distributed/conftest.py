import pytest

from .parity import trained
from .pool import pool_of

two, four = pool_of(2, "package"), pool_of(4, "package")


@pytest.fixture(scope="package")
def alone():
    """Runs on one process, each made once."""
    made = {}

    def alone(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = trained(**options)
        return made[key]

    return alone
