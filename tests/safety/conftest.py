from tests.assistant.conftest import tagged_tokenizer, tokenizer  # noqa: F401
from tests.training.conftest import (  # noqa: F401
    decoder,
    documents,
    model_folder,
    one_thread,
    settings,
    tokenized,
)
