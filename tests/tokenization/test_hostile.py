"""10,000 strings that tokenizers get wrong, through every algorithm and every published shape."""

import unicodedata

import numpy as np
import pytest
from transformers import AutoTokenizer

from bessemer.core.errors import RequestError
from tests.cases import slow

LOSSLESS = ("bpe", "unigram", "sentencepiece_bpe", "character", "byte")


def test_the_strings_hold_what_they_are_meant_to(hostile_texts):
    text = "".join(hostile_texts)
    assert len(hostile_texts) == len(set(hostile_texts)) == 10_000
    assert {ord(character) >> 16 for character in text} == set(range(17))
    assert set(map(chr, [*range(0x20), *range(0x7F, 0xA0)])) <= set(text)
    assert sum(unicodedata.normalize("NFC", text) != text for text in hostile_texts) > 1000
    assert any(character * 150 in text for character in "a \n")
    assert all(typed in text for typed in ("<|im_end|>", "<unk>", "<0x41>", "\u2581", "👩‍👩‍👧‍👦", "🇩🇪"))


@pytest.mark.parametrize("count", [1500, slow(10_000)])
def test_ids_equal_those_of_autotokenizer(every_tokenizer, hostile_texts, count):
    peer, texts = AutoTokenizer.from_pretrained(every_tokenizer.folder), hostile_texts[:count]
    theirs = peer(texts, split_special_tokens=True)["input_ids"]
    ours = [ids.tolist() for ids in every_tokenizer.encode_batch(texts)]
    assert [text for text, one, other in zip(texts, ours, theirs, strict=True) if one != other] == []
    assert [every_tokenizer.encode(text) for text in texts[:500]] == theirs[:500]


@pytest.mark.parametrize("count", [1000, slow(3000)])
def test_ids_equal_those_of_autotokenizer_with_every_split(any_tokenizer, hostile_texts, count):
    peer, texts = AutoTokenizer.from_pretrained(any_tokenizer.folder), hostile_texts[:count]
    theirs = peer(texts, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    ids, offsets = any_tokenizer.encode_flat(texts)
    assert ids.tolist() == [id for ids in theirs for id in ids]
    assert offsets.tolist() == np.cumsum([0, *map(len, theirs)]).tolist()


@pytest.mark.parametrize("count", [3000, slow(10_000)])
@pytest.mark.parametrize("algorithm", LOSSLESS)
def test_decoding_gives_back_every_string(tokenizers_by_algorithm, algorithm, hostile_texts, count):
    tokenizer, texts = tokenizers_by_algorithm[algorithm], hostile_texts[:count]
    marks = algorithm in ("unigram", "sentencepiece_bpe")
    decoded = [tokenizer.decode(tokenizer.encode(text)) for text in texts]
    expected = [text.replace("\u2581", " ") if marks else text for text in texts]
    assert [pair for pair in zip(expected, decoded, strict=True) if pair[0] != pair[1]] == []


def test_which_algorithms_lose_nothing_is_known(tokenizers_by_algorithm, published_tokenizers):
    assert {name for name, tokenizer in tokenizers_by_algorithm.items() if tokenizer.lossless} == set(LOSSLESS)
    assert {name for name, tokenizer in published_tokenizers.items() if tokenizer.lossless} == {"llama2"}


def test_no_typed_control_token_becomes_one(tokenizers_by_algorithm):
    for tokenizer in tokenizers_by_algorithm.values():
        ids = tokenizer.encode("a<|endoftext|> <|im_start|>\n<|im_end|>", add_bos=False)
        assert not {tokenizer.bos_id, *tokenizer.eos_ids} & set(ids)


@pytest.mark.parametrize("at", [0, 3])
def test_a_lone_surrogate_is_refused_by_every_algorithm(every_tokenizer, at):
    text = "abc"[:at] + "\udc80" + "d"
    for encode in (
        every_tokenizer.encode,
        every_tokenizer.encode_with_offsets,
        lambda text: every_tokenizer.encode_flat([text]),
    ):
        with pytest.raises(RequestError, match=rf"^the text has a lone surrogate U\+DC80 at character {at}"):
            encode(text)
