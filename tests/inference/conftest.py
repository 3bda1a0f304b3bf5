"""Small models compute on one of PyTorch's threads: several wait for each other longer than they compute."""

import pytest
import torch

from tests.model.conftest import other_arithmetic  # noqa: F401  (a fixture)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
