import numpy as np
import pytest
from transformers import AutoTokenizer

from bessemer.core.errors import ConfigError
from bessemer.core.store import read_json
from bessemer.tokenization.existing import add_tokens
from bessemer.tokenization.tokenizer import load_tokenizer

ALGORITHMS = ["bpe", "unigram", "sentencepiece_bpe", "wordpiece"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_added_tokens_are_found_in_text_control_tokens_are_not_and_autotokenizer_agrees(
    algorithm, tokenizers_by_algorithm, hostile_texts, tmp_path
):
    before = tokenizers_by_algorithm[algorithm]
    extension = add_tokens(before.folder, tmp_path, ["<tool>", "Bessemer", " 漢字"], ["<|call|>"])
    size = before.vocab_size
    assert extension.added == {size: "<tool>", size + 1: "Bessemer", size + 2: " 漢字", size + 3: "<|call|>"}
    after, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert after.vocab_size == len(theirs) == size + 4
    assert [after.token_bytes(id) for id in range(size)] == [before.token_bytes(id) for id in range(size)]
    assert (after.bos_id, after.chat_template) == (before.bos_id, before.chat_template)
    texts = ["a <tool> Bessemer <tool><tool>xBessemery 漢字  漢字<|call|> <|im_end|>", *hostile_texts[:100]]
    for text in texts:
        assert after.encode(text) == theirs(text, split_special_tokens=True).input_ids, text
        if text != texts[0]:
            assert after.encode(text) == before.encode(text), text
    ids = after.encode(texts[0], add_bos=False)
    assert [ids.count(id) for id in extension.added] == [3, 2, 2, 0]
    assert np.concatenate(after.encode_batch(texts)).tolist() == [id for text in texts for id in after.encode(text)]


def test_a_token_that_is_one_already_is_skipped(tokenizer, tmp_path):
    once = add_tokens(tokenizer.folder, tmp_path, ["<tool>"], ["<|call|>"])
    a, call, tool = tokenizer.encode("a", add_bos=False)[0], *sorted(once.added, reverse=True)
    again = add_tokens(tmp_path, tmp_path, ["<tool>", "a"], ["<|call|>", "<|im_end|>", "<|new|>"])
    assert again.skipped == {"<tool>": tool, "a": a, "<|call|>": call, "<|im_end|>": tokenizer.bos_id + 2}
    assert again.added == {tokenizer.vocab_size + 2: "<|new|>"}
    config = read_json(tmp_path / "tokenizer_config.json")
    assert config["additional_special_tokens"].count("<|new|>") == 1
    assert config["added_tokens_decoder"][str(tool)]["special"] is False


@pytest.mark.parametrize(
    ("tokens", "special", "message"),
    [
        ([""], [], "an empty token"),
        (["<x>"], ["<x>"], "is named twice"),
        (["<|im_end|>"], [], "there already .id [0-9]+., as a control token"),
        ([], ["a"], "there already .id [0-9]+., as an ordinary token"),
        (["Ġ"], [], "the vocabulary writes another token so"),
        (["\ud800"], [], "half a surrogate pair"),
    ],
)
def test_a_token_that_cannot_be_added_is_refused(tokens, special, message, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=message):
        add_tokens(tokenizer.folder, tmp_path / "out", tokens, special)
    assert not (tmp_path / "out").exists()
