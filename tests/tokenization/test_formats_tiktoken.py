import base64

import pytest
import tiktoken
from transformers import AutoTokenizer

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import read_json, write_json
from bessemer.tokenization.formats import export_tokenizer, import_tokenizer
from bessemer.tokenization.formats.tiktoken import read_ranks
from bessemer.tokenization.split import SPLIT_REGEXES
from bessemer.tokenization.tokenizer import load_tokenizer


def write_ranks(path, tokens, start=0):
    path.write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens, start)), encoding="utf-8"
    )
    return path


#: Not in the order of the bytes, as in OpenAI's own files.
BYTES = [bytes([byte]) for byte in [*range(33, 256), *range(33)]]


def encoding(path, split, special):
    return tiktoken.Encoding("peer", pat_str=SPLIT_REGEXES[split], mergeable_ranks=read_ranks(path), special_tokens=special)


def test_an_exported_file_gives_tiktoken_our_ids(any_tokenizer, hostile_texts, tmp_path):
    notes = export_tokenizer(any_tokenizer.folder, tmp_path / "x.tiktoken", "tiktoken")
    split = notes[0].split("the split ")[1].split(" ")[0]
    special = {"<|endoftext|>": any_tokenizer.bos_id}
    peer = encoding(tmp_path / "x.tiktoken", split, special)
    for text in hostile_texts[:500]:
        assert peer.encode(text, disallowed_special=()) == any_tokenizer.encode(text, add_bos=False), text


def test_an_imported_file_has_tiktokens_ids_also_for_tokens_that_were_put_in_by_hand(hostile_texts, tmp_path):
    # " whole" is no merge of two others; "abc" is one only of a token that comes after it
    tokens = [*BYTES, b"th", b"the", b" t", b" whole", b"abc", b"bc", b"\xe6\x97", b"  "]
    path = write_ranks(tmp_path / "hand.tiktoken", tokens)
    import_tokenizer(path, tmp_path / "out", split="gpt-2", special_tokens=["<|endoftext|>", "<|im_end|>"])
    ours, peer = load_tokenizer(tmp_path / "out"), encoding(path, "gpt-2", {"<|endoftext|>": 264, "<|im_end|>": 265})
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (266, 264, (264, 265))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ["the whole abc xabcx abcabc the", " wholes", "日本", *hostile_texts[:300]]:
        ids = peer.encode(text, disallowed_special=())
        assert ours.encode(text, add_bos=False) == ids == theirs(text, split_special_tokens=True).input_ids, text
    assert ours.encode(" whole", add_bos=False) == [259]


def test_control_tokens_keep_the_ids_that_are_given_and_the_gap_before_them(tmp_path):
    path = write_ranks(tmp_path / "x.tiktoken", [*BYTES, b"th"])
    import_tokenizer(path, tmp_path / "out", split="qwen2", special_tokens={"<|endoftext|>": 259, "<|fim_prefix|>": 260})
    ours = load_tokenizer(tmp_path / "out")
    assert (ours.vocab_size, ours.bos_id, ours.token_bytes(260)) == (261, 259, b"<|fim_prefix|>")
    assert ours.encode("th", add_bos=False) == [256]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"special_tokens": ["<|endoftext|>"]}, "does not hold its split regex; give its name with --split: gpt-2"),
        ({"split": "gpt-9", "special_tokens": ["<|endoftext|>"]}, "there is no split 'gpt-9'"),
        ({"split": "gpt-2"}, "does not hold its control tokens; give them with --special"),
        ({"split": "gpt-2", "special_tokens": {"<|endoftext|>": 3}}, "the id 3 of the control token '<|endoftext|>' is taken"),
    ],
)
def test_what_the_file_does_not_hold_must_be_given(given, message, tmp_path):
    path = write_ranks(tmp_path / "x.tiktoken", BYTES)
    with pytest.raises(ConfigError, match=message):
        import_tokenizer(path, tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [*lines[:7], "no token", *lines[7:]], "line 8: this is no token"),
        (lambda lines: lines[1:], "lacks the byte 0x21"),
        (lambda lines: [*lines, "dGg= 5"], "gives a rank twice"),
    ],
)
def test_a_damaged_file_is_refused(spoil, message, tmp_path):
    path = write_ranks(tmp_path / "x.tiktoken", BYTES)
    path.write_text("\n".join(spoil(path.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    with pytest.raises(ArtefactError, match=message):
        import_tokenizer(path, tmp_path / "out", split="gpt-2", special_tokens=["<|endoftext|>"])


def test_merges_in_another_order_than_the_ids_are_not_exported(tokenizer, tmp_path):
    content = read_json(tokenizer.folder / "tokenizer.json")
    content["model"]["merges"] = content["model"]["merges"][::-1]
    (tmp_path / "own").mkdir()
    write_json(tmp_path / "own" / "tokenizer.json", content)
    with pytest.raises(ArtefactError, match="its merges are not in the order of its ids"):
        export_tokenizer(tmp_path / "own", tmp_path / "x.tiktoken", "tiktoken")
    assert not (tmp_path / "x.tiktoken").exists()


def test_only_byte_level_bpe_is_exported(tokenizers_by_algorithm, tmp_path):
    with pytest.raises(ArtefactError, match="only byte-level BPE"):
        export_tokenizer(tokenizers_by_algorithm["unigram"].folder, tmp_path / "x.tiktoken", "tiktoken")
