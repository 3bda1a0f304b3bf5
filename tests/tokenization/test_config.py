import pytest

from bessemer.core.errors import ConfigError
from bessemer.tokenization.config import TokenizeConfig


def test_a_misspelt_split_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"^tokenize\.split: no split regex is named 'qwem2'; did you mean 'qwen2'\?$"):
        TokenizeConfig.parse({"split": "qwem2"}, "tokenize")


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="at least 259"):
        TokenizeConfig.parse({"vocab_size": 258}, "tokenize")


def test_the_smallest_vocabulary_is_the_bytes_and_the_control_tokens():
    assert TokenizeConfig(vocab_size=259).vocab_size == 259
