import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.tokenization import fast
from bessemer.tokenization.fast import HOSTILE_TEXTS
from bessemer.tokenization.special import SPECIAL_TOKENS
from bessemer.tokenization.tokenizer import load_tokenizer

#: Every plane but the surrogates, with what is hard drawn often: runs, white space, marks, control tokens.
hostile = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from(
            [*SPECIAL_TOKENS, "\r\n", "   ", "'s", "'ſ", "e\u0301", "👩‍👩‍👧", "İ", "\u2028", "\x00", "123456", "ﬁ"]
        ),
        st.builds(lambda character, count: character * count, st.sampled_from("a \n-1é日"), st.integers(1, 60)),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def peer(any_tokenizer):
    return AutoTokenizer.from_pretrained(any_tokenizer.folder)


@settings(max_examples=300, deadline=None)
@given(text=hostile)
def test_ids_equal_those_of_autotokenizer_with_control_tokens_read_as_text(any_tokenizer, peer, text):
    assert any_tokenizer.encode(text) == peer(text, split_special_tokens=True)["input_ids"]


def test_ids_equal_those_of_autotokenizer_by_default_where_no_control_token_is_written(any_tokenizer, peer, corpus):
    for text in [*corpus, *(text for text in HOSTILE_TEXTS if not any(token in text for token in SPECIAL_TOKENS))]:
        assert any_tokenizer.encode(text) == peer(text)["input_ids"]
        assert any_tokenizer.encode(text, add_bos=False) == peer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=200, deadline=None)
@given(text=hostile)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 599), max_size=30), skip_special=st.booleans())
def test_any_ids_decode_as_transformers_decodes_them(tokenizer, ids, skip_special):
    peer = cached_peer(tokenizer)
    assert tokenizer.decode(ids, skip_special) == peer.decode(ids, skip_special_tokens=skip_special)


_peers = {}


def cached_peer(tokenizer):
    if tokenizer.folder not in _peers:
        _peers[tokenizer.folder] = AutoTokenizer.from_pretrained(tokenizer.folder)
    return _peers[tokenizer.folder]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(hostile, max_size=5))
def test_bulk_encoding_equals_encoding_one_by_one(any_tokenizer, texts):
    assert [ids.tolist() for ids in any_tokenizer.encode_batch(texts)] == [any_tokenizer.encode(text) for text in texts]
    ids, offsets = any_tokenizer.encode_flat(texts)
    assert ids.tolist() == [id for text in texts for id in any_tokenizer.encode(text, add_bos=False)]
    assert offsets.tolist()[-1] == len(ids)


def test_a_document_begins_with_the_token_that_also_ends_it(tokenizer):
    assert tokenizer.encode("")[0] == tokenizer.bos_id == tokenizer.vocab_size - 3
    assert tokenizer.eos_ids == (tokenizer.bos_id, tokenizer.vocab_size - 1)


def test_transformers_takes_the_file_as_it_is(tokenizer):
    peer = cached_peer(tokenizer)
    assert peer.backend_tokenizer.normalizer is None
    assert (peer.bos_token_id, peer.eos_token_id, len(peer)) == (tokenizer.bos_id, tokenizer.bos_id, tokenizer.vocab_size)


def test_text_that_is_not_in_normal_form_keeps_its_bytes(tokenizer):
    assert tokenizer.encode("e\u0301") != tokenizer.encode("\u00e9")


def test_control_tokens_are_shown_or_left_out(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("ab", add_bos=False), tokenizer.eos_ids[1]]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special=False) == "<|endoftext|>ab<|im_end|>"


def test_typed_control_tokens_never_become_control_tokens(tokenizer):
    ids = tokenizer.encode("".join(SPECIAL_TOKENS), add_bos=False)
    assert not any(tokenizer.is_special(id) for id in ids)
    assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS)


def test_a_lone_surrogate_is_refused_in_one_line_wherever_it_comes_in(tokenizer):
    message = r"^the text has a lone surrogate U\+D83D at character 2"
    with pytest.raises(RequestError, match=message):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(RequestError, match=message):
        tokenizer.encode_flat(["that is fine", "ab\ud83d"])
    with pytest.raises(RequestError, match=r"^message 1: the text has a lone surrogate U\+D83D at character 2"):
        tokenizer.encode_chat([{"role": "user", "content": "x"}, {"role": "user", "content": "ab\ud83d"}])


@pytest.mark.parametrize("id", [-1, 600])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, id):
    with pytest.raises(RequestError, match="outside the vocabulary of 600"):
        tokenizer.decode([id])


def test_numpy_ids_decode(tokenizer):
    assert tokenizer.decode(np.array(tokenizer.encode("abc"), np.uint16)) == "abc"


def test_fastokens_is_used_where_it_agrees(any_tokenizer):
    assert any_tokenizer.bulk.name == "fastokens"


def test_an_encoder_that_differs_on_one_hostile_text_is_left_aside(tokenizer, monkeypatch):
    class NearlyRight(fast.FastokensEncoder):
        def encode_flat(self, texts):
            return super().encode_flat([text.replace("\u212a", "k") for text in texts])  # the Kelvin sign

    assert "\u212a" in "".join(HOSTILE_TEXTS)
    monkeypatch.setattr(fast, "FastokensEncoder", NearlyRight)
    assert fast.bulk_encoder(tokenizer.folder / "tokenizer.json").name == "tokenizers"


def test_a_tokenizer_that_fastokens_cannot_load_is_encoded_with_tokenizers(tokenizer, monkeypatch):
    def refuse(path):
        raise ValueError("unsupported pre-tokenizer")

    monkeypatch.setattr(fast.fastokens.Tokenizer, "from_file", refuse, raising=False)
    assert fast.bulk_encoder(tokenizer.folder / "tokenizer.json").name == "tokenizers"


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_damaged_tokenizer_is_refused(tokenizer, tmp_path):
    shutil.copytree(tokenizer.folder, tmp_path / "damaged")
    path = tmp_path / "damaged" / "tokenizer.json"
    path.write_text(path.read_text()[:1000])
    with pytest.raises(ArtefactError, match=r"tokenizer\.json: this tokenizer is damaged"):
        load_tokenizer(tmp_path / "damaged")


def test_a_kind_of_vocabulary_that_is_not_read_is_refused_by_name(tokenizer, tmp_path):
    shutil.copytree(tokenizer.folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["decoder"] = {"type": "BPEDecoder", "suffix": "</w>"}
    path.write_text(json.dumps(content))
    with pytest.raises(
        ArtefactError, match=r"tokenizer\.json: a BPE tokenizer with the decoder BPEDecoder is of a kind that is not"
    ):
        load_tokenizer(tmp_path / "other")
