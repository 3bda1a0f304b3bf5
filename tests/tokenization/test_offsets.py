"""Where tokens stand: against the text's own bytes, against the tokens' text, and by hand where the library is wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenization.hostile import hostile_strings

#: Kinds whose tokens' bytes are the text's: no normalizer, no white space between tokens.
EXACT = ("bpe", "unigram", "sentencepiece_bpe", "character", "byte", "llama2", "gpt2")
NORMALISED = ("qwen", "unigram-nfkc", "t5")
WORDS = ("wordpiece", "word", "bert")

#: Any text, and the hard ones that hypothesis would take long to find.
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.sampled_from(hostile_strings(2000, seed=23))
)


@pytest.fixture(scope="module")
def tokenizers(tokenizers_by_algorithm, published_tokenizers):
    return tokenizers_by_algorithm | published_tokenizers


def spelt(tokenizer, ids):
    return [tokenizer.token_bytes(id).decode("utf-8", "replace") for id in ids]


@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_ids_are_those_of_encoding_and_spans_cover_the_text_in_order(tokenizers, text):
    for name in (*EXACT, *NORMALISED):
        ids, spans = tokenizers[name].encode_with_offsets(text)
        assert ids == tokenizers[name].encode(text, add_bos=False)
        assert (spans.dtype, spans.shape) == (np.int64, (len(ids), 2))
        starts, ends = spans.T
        assert (starts <= ends).all() and (np.diff(spans, axis=0) >= 0).all()
        covered = {at for start, end in spans for at in range(start, end)}
        assert covered == (set(range(len(text))) if ids else set())


@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_a_span_is_that_of_the_characters_whose_bytes_the_token_holds(tokenizers, text):
    for name in EXACT:
        tokenizer = tokenizers[name]
        ids, spans = tokenizer.encode_with_offsets(text)
        pieces = [tokenizer.token_bytes(id) for id in ids]
        of_byte = [at for at, character in enumerate(text) for _ in character.encode()]
        if name in ("unigram", "sentencepiece_bpe", "llama2"):  # U+2581 is a space to them
            of_byte = [at for at, character in enumerate(text.replace("\u2581", " ")) for _ in character.encode()]
        place = len(of_byte) - sum(map(len, pieces))  # -1 where a space was put before the text
        assert place in ((0, -1) if name in ("llama2", "gpt2") else (0,))
        for piece, (start, end) in zip(pieces, spans.tolist(), strict=True):
            held = of_byte[max(place, 0) : place + len(piece)]
            assert (start, end) == ((held[0], held[-1] + 1) if held else (0, 0))
            place += len(piece)


@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_a_words_span_is_the_text_that_normalises_to_it(tokenizers, text):
    for name in WORDS:
        tokenizer = tokenizers[name]
        normalizer = tokenizer._tokenizer.normalizer
        ids, spans = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text, add_bos=False)
        assert (np.diff(spans, axis=0) >= 0).all()
        for id, (start, end) in zip(ids, spans.tolist(), strict=True):
            word = tokenizer._tokenizer.id_to_token(id)
            if tokenizer.is_special(id):  # an unknown word
                assert end > start
                continue
            normal = normalizer.normalize_str(text[start:end]).strip() if normalizer else text[start:end]
            assert normal == word.removeprefix("##")


@pytest.mark.parametrize("name", ["qwen", "unigram-nfkc"])
def test_a_span_in_normalised_text_holds_the_characters_the_token_comes_from(tokenizers, name):
    tokenizer = tokenizers[name]
    normalizer = tokenizer._tokenizer.normalizer
    wrong = []
    for text in hostile_strings(500, seed=31):
        text = text.replace("<0x", "<0")  # this Unigram takes the name of a byte for the byte, as the library does
        ids, spans = tokenizer.encode_with_offsets(text)
        for piece, (start, end) in zip(spelt(tokenizer, ids), spans.tolist(), strict=True):
            if "\ufffd" not in piece:
                normal = normalizer.normalize_str(text[start:end]).replace("\u2581", " ")
                wrong += [(text, piece)] if piece not in normal else []
    assert wrong == []


def test_text_in_normal_form_c_gives_its_combining_marks_to_the_token_before(tokenizers):
    ids, spans = tokenizers["qwen"].encode_with_offsets("e\u0301x\u0323\u0301")
    assert tokenizers["qwen"].decode(ids) == "\u00e9x\u0323\u0301"
    assert spans[spans[:, 0] == 0].tolist() == [[0, 2]] * (spans[:, 0] == 0).sum()
    assert spans[-1].tolist() == [4, 5]


def test_the_bytes_of_unknown_characters_span_one_character_each(tokenizers):
    tokenizer = tokenizers["unigram-nfkc"]
    ids, spans = tokenizer.encode_with_offsets("\u6c34㍿\u5c71")  # the second is four characters of three bytes in NFKC
    assert len(ids) == 3 + 12 + 3
    assert spans.tolist() == [[0, 1]] * 3 + [[1, 2]] * 12 + [[2, 3]] * 3
    library = tokenizer._tokenizer.encode("\u6c34㍿\u5c71", add_special_tokens=False).offsets
    assert set(library) == {(0, 3)}  # when this fails the library is mended, and so can be `spread_runs`


@pytest.mark.parametrize("name", ["llama2", "t5", "gpt2"])
def test_a_space_put_before_the_text_spans_nothing(tokenizers, name):
    tokenizer = tokenizers[name]
    ids, spans = tokenizer.encode_with_offsets("\u0416")
    assert tokenizer.token_bytes(ids[0]) == b" "
    assert spans[:2].tolist() == [[0, 0], [0, 1]]


def test_a_space_that_the_text_has_spans_itself(tokenizers):
    for name in (*EXACT, "t5"):
        _, spans = tokenizers[name].encode_with_offsets(" \u0416")
        assert spans[-1].tolist() == [1, 2]
        assert [0, 1] in spans.tolist()


def test_an_added_token_in_the_text_spans_its_characters(tokenizers):
    tokenizer = tokenizers["qwen"]
    ids, spans = tokenizer.encode_with_offsets("\u00e9<think>\u65e5")
    at = ids.index(tokenizer._tokenizer.token_to_id("<think>"))
    assert spans[at].tolist() == [1, 8]
    assert spans[-1].tolist() == [8, 9]
