from tests.assistant.conftest import tagged_tokenizer, tokenizer  # noqa: F401
