import json
import shutil

import pytest
from transformers import AutoTokenizer

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import read_json, write_json
from bessemer.tokenization.formats import import_tokenizer
from bessemer.tokenization.formats.exchange import find_source
from bessemer.tokenization.split import split_name
from bessemer.tokenization.tokenizer import load_tokenizer


def assert_same_ids(folder, ours, texts):
    """The folder encodes as `ours` does, and `AutoTokenizer` on it too."""
    back, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert (back.bos_id, back.vocab_size, len(theirs)) == (ours.bos_id, ours.vocab_size, ours.vocab_size)
    for text in texts:
        ids = ours.encode(text)
        assert back.encode(text) == ids == theirs(text, split_special_tokens=True).input_ids, text
    return back, theirs


def test_a_tokenizer_json_alone_is_copied_byte_for_byte_and_its_roles_are_recognised(every_tokenizer, hostile_texts, tmp_path):
    source = tmp_path / "any name.json"
    shutil.copyfile(every_tokenizer.folder / "tokenizer.json", source)
    assert import_tokenizer(source, tmp_path / "out")[0] == "tokenizer.json"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == source.read_bytes()
    back, theirs = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back.bos_id in (theirs.bos_token_id, theirs.eos_token_id) and theirs.eos_token_id in back.eos_ids
    for text in hostile_texts[:100]:
        assert back.encode(text) == every_tokenizer.encode(text) == theirs(text, split_special_tokens=True).input_ids, text


def test_a_folder_of_another_class_keeps_its_ids_template_and_roles(tokenizer, hostile_texts, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tokenizer.folder, source)
    config = read_json(source / "tokenizer_config.json") | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}
    config |= {"bos_token": {"__type": "AddedToken", "content": "<|endoftext|>"}, "pad_token": "[PAD]", "model_max_length": 77}
    (source / "chat_template.jinja").write_text(config.pop("chat_template"), encoding="utf-8")
    write_json(source / "tokenizer_config.json", config)
    _, notes = import_tokenizer(source, tmp_path / "out")
    assert notes == ["pad_token '[PAD]' is not in the vocabulary and is left out"]
    back, theirs = assert_same_ids(tmp_path / "out", tokenizer, hostile_texts[:100])
    assert back.chat_template == theirs.chat_template == tokenizer.chat_template
    assert (theirs.bos_token, theirs.pad_token, theirs.model_max_length) == ("<|endoftext|>", None, 77)


def test_vocab_and_merges_give_gpt2s_tokenizer(any_tokenizer, hostile_texts, tmp_path):
    content = read_json(any_tokenizer.folder / "tokenizer.json")
    source = tmp_path / "source"
    source.mkdir()
    controls = {token["content"]: token["id"] for token in content["added_tokens"]}
    (source / "vocab.json").write_text(
        json.dumps(content["model"]["vocab"] | {"<|endoftext|>": any_tokenizer.bos_id}), encoding="utf-8"
    )
    (source / "added_tokens.json").write_text(json.dumps(controls), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in content["model"]["merges"])
    (source / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    import_tokenizer(source, tmp_path / "out", split=split_name(content["pre_tokenizer"]))
    back = load_tokenizer(tmp_path / "out")
    assert (back.vocab_size, back.bos_id, back.eos_ids) == (
        any_tokenizer.vocab_size,
        any_tokenizer.bos_id,
        any_tokenizer.eos_ids,
    )
    for text in hostile_texts[:200]:
        assert back.encode(text, add_bos=False) == any_tokenizer.encode(text, add_bos=False), text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'{"model": ', "this JSON file is damaged"),
        ("x.json", b'{"a": 1}', "is no tokenizer.json"),
        ("x.bin", b"\x93NUMPY", "not a tokenizer known here"),
        ("x.json", b'{"model": {"type": "BPE"}}', "damaged or of an unknown kind"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_and_leaves_nothing(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=message):
        import_tokenizer(tmp_path / name, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_holds_something_is_not_written_over(tokenizer, tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(ArtefactError, match="exists already and is not empty"):
        import_tokenizer(tokenizer.folder, tmp_path)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "keep me"


def test_settings_for_other_formats_are_refused(tokenizer, tmp_path):
    for given in ({"split": "gpt-2"}, {"special_tokens": ["<s>"]}):
        with pytest.raises(ConfigError, match="is for"):
            import_tokenizer(tokenizer.folder, tmp_path / "out", **given)


def test_the_format_is_found_by_content(tokenizer, tmp_path):
    assert find_source(tokenizer.folder) == ("tokenizer.json", tokenizer.folder / "tokenizer.json")
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n", encoding="utf-8")
    assert find_source(tmp_path) == ("tiktoken", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert find_source(tmp_path)[0] == "sentencepiece"
