import pytest

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
