import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.tokenization.prompts import StreamingDecoder
from tests.cases import slow_but
from tests.tokenization.conftest import ALGORITHMS
from tests.tokenization.published import SHAPES

#: Of each way to make a text out of tokens one.
WAYS = ["bpe", "unigram", "wordpiece", "word", "byte", "llama2"]


@pytest.mark.parametrize("every_tokenizer", slow_but(WAYS, [*ALGORITHMS, *SHAPES]), indirect=True)
@settings(max_examples=60, deadline=None)
@given(chunks=st.lists(st.lists(st.integers(0, 10_000), max_size=4), max_size=10), skip_special=st.booleans())
def test_what_was_fed_and_the_rest_make_the_whole_text(every_tokenizer, chunks, skip_special):
    chunks = [[id % every_tokenizer.vocab_size for id in chunk] for chunk in chunks]
    decoder = StreamingDecoder(every_tokenizer, skip_special)
    text = "".join(decoder.feed(chunk) for chunk in chunks) + decoder.flush()
    assert text == every_tokenizer.decode([id for chunk in chunks for id in chunk], skip_special)


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_stream_never_shows_half_a_character(every_tokenizer, text):
    decoder = StreamingDecoder(every_tokenizer)
    ids = every_tokenizer.encode(text)
    streamed = "".join(decoder.feed([id]) for id in ids)
    assert streamed.count("\ufffd") == every_tokenizer.decode(ids).count("\ufffd")
    assert decoder.flush() == ""


def test_the_space_before_a_text_is_left_out_of_its_first_token_alone(published_tokenizers):
    tokenizer = published_tokenizers["llama2"]
    space, letter = tokenizer.encode("\u0416", add_bos=False)[0], tokenizer.encode(" a", add_bos=False)
    decoder = StreamingDecoder(tokenizer)
    assert [decoder.feed(ids) for ids in ([tokenizer.bos_id], [space], [], [space], letter)] == ["", "", "", " ", "  a"]
    assert decoder.flush() == ""
    assert decoder.feed([space]) == ""  # a new text
    assert StreamingDecoder(tokenizer, goes_on=True).feed([space]) == " "


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_texts_bytes_one_by_one_never_give_half_a_character(tokenizer, text):
    decoder = StreamingDecoder(tokenizer)
    pieces = [decoder.feed([byte]) for byte in text.encode()]  # the first 256 ids are the bytes
    assert [piece for piece in pieces if piece] == list(text)
    assert decoder.flush() == ""


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_never_ends_becomes_one_replacement_character(tokenizer, cut):
    decoder = StreamingDecoder(tokenizer)
    assert decoder.feed("👍".encode()[:cut]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.feed(b"ok") == "ok"
