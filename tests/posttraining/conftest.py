import pytest

from bessemer.tokenization.tokenizer import load_tokenizer
from tests.training.conftest import (  # noqa: F401
    decoder,
    documents,
    model_folder,
    one_thread,
    settings,
    tokenized,
)


@pytest.fixture(scope="session")
def tokenizer(model_folder):  # noqa: F811
    return load_tokenizer(model_folder)
