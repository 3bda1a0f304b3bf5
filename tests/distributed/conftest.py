import pytest

from .parity import trained
from .pool import Pool


@pytest.fixture(scope="package")
def two():
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="package")
def four():
    pool = Pool(4)
    yield pool
    pool.close()


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
