import pytest
import tokenizers

from bessemer.tokenization.folder import CHAT_TEMPLATE_FILE, TOKENIZER_FILE
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.tokenizers import write_small_tokenizer
from tests.training.conftest import one_thread  # noqa: F401


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Single bytes and a few merges, with ChatML."""
    return load_tokenizer(write_small_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def thinking_tokenizer(tmp_path_factory):
    """The same of a model that always thinks: its prompts open the thinking."""
    folder = write_small_tokenizer(tmp_path_factory.mktemp("thinking"))
    (folder / CHAT_TEMPLATE_FILE).write_text(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
        encoding="utf-8",
    )
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def channel_tokenizer(tmp_path_factory):
    """The first with the control tokens and a template of gpt-oss."""
    folder = write_small_tokenizer(tmp_path_factory.mktemp("channels"))
    file = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    file.add_special_tokens([f"<|{tag}|>" for tag in ("channel", "message", "end", "start", "constrain", "call", "return")])
    file.save(str(folder / TOKENIZER_FILE))
    (folder / CHAT_TEMPLATE_FILE).write_text(
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
        "{% for message in messages %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|im_end|>' }}"
        "{% endfor %}{# <|channel|>analysis<|message|> #}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        encoding="utf-8",
    )
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def tagged_tokenizer(tmp_path_factory):
    """The first with control tokens for thinking and calls, as some models have them."""
    folder = write_small_tokenizer(tmp_path_factory.mktemp("tagged"))
    file = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    file.add_special_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>", "<|other|>"])
    file.save(str(folder / TOKENIZER_FILE))
    return load_tokenizer(folder)
