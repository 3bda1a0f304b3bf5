from __future__ import annotations

import pytest
import torch

from tests.inference.models import small_tokenizer
from tests.training.conftest import documents, model_folder, settings, tokenized  # noqa: F401


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """That of the small decoders."""
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))
