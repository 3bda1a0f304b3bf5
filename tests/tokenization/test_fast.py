import json
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.store import read_json
from bessemer.tokenization import fast
from bessemer.tokenization.bpe import byte_level_bpe, train_bpe
from bessemer.tokenization.fast import FastokensEncoder, TokenizersEncoder, agree, bulk_encoder, certain_split, in_parts
from bessemer.tokenization.folder import TOKENIZER_FILE, write_folder
from bessemer.tokenization.split import APPROXIMATED_REGEXES, SPLIT_REGEXES
from tests.cases import in_turn, slow_but

KNOWN = {**SPLIT_REGEXES, **APPROXIMATED_REGEXES}
LONG_S = "'\u017f"
OPTIONS = ("single_word", "lstrip", "rstrip", "normalized")

texts = st.lists(
    st.sampled_from(["ab", "É", "日本", "e\u0301", "'s", "'", LONG_S, "1", "23", " ", "  ", "\n", "\x1c", ".", "-", "/", "👍"]),
    max_size=40,
).map("".join)


def joining_everything(folder, split):
    """A tokenizer whose merges cross every cut, so that a piece too long or too short shows in the ids."""
    parts = ["ab", "E", "日本", "e\u0301", "\u017f", "'s", "'", "1", " ", "\n", ".", "/"]
    tokens = train_bpe([a + b for a in parts for b in parts] + ["\u017fab"] * 9, 120, r"(?s).+")
    write_folder(folder, byte_level_bpe(tokens, split))
    return folder / TOKENIZER_FILE


@pytest.fixture(scope="module", params=slow_but(["gpt-2", "qwen35", "tekken"], sorted(KNOWN)))
def path(request, tmp_path_factory):
    return joining_everything(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return joining_everything(tmp_path_factory.mktemp("joining"), "qwen2")


@cache
def reference(path):
    loaded = tokenizers.Tokenizer.from_file(str(path))
    loaded.encode_special_tokens = True
    return loaded


def whole(path, text):
    """Ids from `tokenizers`, of the text in one."""
    return reference(path).encode(text, add_special_tokens=False).ids


def test_encoders_in_parts_give_the_ids_of_the_whole(path, monkeypatch):
    monkeypatch.setattr(fast, "_CHARACTERS_PER_PART", 3)
    monkeypatch.setattr(fast, "_CHARACTERS_AT_ONCE", 5)
    encoders = [TokenizersEncoder(path), FastokensEncoder(path)]

    @given(st.lists(texts, max_size=4))
    @settings(max_examples=80, deadline=None)
    def as_the_whole(many):
        expected = [whole(path, text) for text in many]
        for encoder in encoders:
            ids, offsets = encoder.encode_flat(many)
            assert (ids.dtype, offsets.dtype, len(offsets)) == (np.uint32, np.int64, len(many) + 1)
            assert [ids[start:end].tolist() for start, end in pairwise(offsets)] == expected

    as_the_whole()


@given(texts, st.sampled_from(sorted(KNOWN)))
@settings(deadline=None)
def test_a_text_is_parted_only_where_its_regex_cuts(text, split):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "_CHARACTERS_PER_PART", 3)
        parts, _ = in_parts([text], cut=True)
    assert [piece for part in parts for piece in regex.findall(KNOWN[split], part)] == regex.findall(KNOWN[split], text)


def test_base64_and_prose_are_parted_and_runs_of_one_character_are_not():
    longest = fast._CHARACTERS_PER_PART
    for text, most in [("Zm9vYmFy+/" * 20_000, longest + 10), ("some words " * 20_000, longest + 10), ("a" * 200_000, 200_000)]:
        parts, firsts = in_parts(["", text, "b"], cut=True)
        assert "".join(parts) == text + "b"
        assert max(map(len, parts)) <= most
        assert firsts.tolist() == [0, 1, len(parts) - 1, len(parts)]


def test_a_contraction_with_a_long_s_is_left_to_tokenizers(qwen2):
    text = "it" + LONG_S + "ab "
    assert FastokensEncoder(qwen2)._tokenizer.encode(text, add_special_tokens=False).ids != whole(qwen2, text)
    ids, offsets = FastokensEncoder(qwen2).encode_flat(["ab", text, "", text, "1"])
    assert ids.tolist() == whole(qwen2, "ab") + 2 * whole(qwen2, text) + whole(qwen2, "1")
    assert len(offsets) == 6
    assert bulk_encoder(qwen2).name == "fastokens"


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        {"added_tokens": [{"id": 0, "content": "a (b)", "special": False, **dict.fromkeys(OPTIONS, False)}]},
    ],
)
def test_texts_stay_whole_where_something_may_reach_over_a_cut(qwen2, change):
    description = read_json(qwen2)
    for text, split in ((description, "qwen2"), ({**description, **change}, None)):
        assert certain_split(tokenizers.Tokenizer.from_str(json.dumps(text))) == split


def edited(path, folder, **sections):
    target = folder / TOKENIZER_FILE
    target.write_text(json.dumps({**read_json(path), **sections}), encoding="utf-8")
    return target


def wrong_where(marked):
    """An `encode_flat` of fastokens whose last id is wrong when a text holds something."""
    honest = FastokensEncoder.encode_flat

    def encode_flat(self, many):
        ids, offsets = honest(self, many)
        return (np.append(ids[:-1], ids[-1] ^ 1), offsets) if any(marked in text for text in many) else (ids, offsets)

    return encode_flat


def test_one_different_id_on_the_hard_texts_leaves_fastokens_aside(qwen2, monkeypatch):
    assert bulk_encoder(qwen2).name == "fastokens"
    monkeypatch.setattr(FastokensEncoder, "encode_flat", wrong_where("e\u0301"))
    assert bulk_encoder(qwen2).name == "tokenizers"


def test_the_tokenizers_own_added_tokens_are_among_the_hard_texts(qwen2, tmp_path, monkeypatch):
    added = read_json(qwen2)["added_tokens"]
    tool = {**added[0], "id": added[-1]["id"] + 1, "content": "<tool_call>", "special": False, "lstrip": True}
    path = edited(qwen2, tmp_path, added_tokens=[*added, tool])
    probes = ["a <tool_call> b", "<tool_call>", "x<tool_call><tool_call>\n"]
    ids, _ = bulk_encoder(path).encode_flat(probes)
    assert ids.tolist() == [id for probe in probes for id in whole(path, probe)]
    assert tool["id"] in ids
    monkeypatch.setattr(FastokensEncoder, "encode_flat", wrong_where("b  <tool_call>"))
    assert bulk_encoder(path).name == "tokenizers"


@pytest.mark.parametrize(
    "sections",
    [
        {
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            "decoder": None,
        },
        {"pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": None},
    ],
)
def test_what_fastokens_cannot_load_is_encoded_by_tokenizers(qwen2, tmp_path, sections):
    path = edited(qwen2, tmp_path, **sections)
    with pytest.raises(ValueError):
        FastokensEncoder(path)
    encoder = bulk_encoder(path)
    assert encoder.name == "tokenizers"
    assert encoder.encode_flat(["ab 1", "é"])[0].tolist() == whole(path, "ab 1") + whole(path, "é")


def test_a_truncation_in_the_file_does_not_reach_the_shards(qwen2, tmp_path):
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path = edited(qwen2, tmp_path, truncation=truncation)
    ids, _ = bulk_encoder(path).encode_flat(["1 2 3 4 5 6 7 8 9"])
    assert ids.tolist() == whole(qwen2, "1 2 3 4 5 6 7 8 9")


def test_no_texts_have_no_ids(qwen2):
    for encoder in (FastokensEncoder(qwen2), TokenizersEncoder(qwen2)):
        for many in ([], [""]):
            ids, offsets = encoder.encode_flat(many)
            assert ids.tolist() == []
            assert offsets.tolist() == [0] * (len(many) + 1)


@pytest.mark.parametrize(
    ("character", "path"), in_turn(["a", " ", "1", "-", "\n", "日", "👍", "\u0301"], sorted(KNOWN)), indirect=["path"]
)
def test_a_long_run_of_one_character_is_encoded_alike(path, character):
    encoders = FastokensEncoder(path), TokenizersEncoder(path)
    assert agree(*encoders, [character * 20_001, "x" + character * 4097 + "x"])
