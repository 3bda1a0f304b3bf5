from tests.training.conftest import (  # noqa: F401
    decoder,
    documents,
    model_folder,
    one_thread,
    settings,
    tokenized,
)
