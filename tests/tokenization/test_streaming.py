import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.tokenization.streaming import StreamingDecoder


@settings(max_examples=300, deadline=None)
@given(chunks=st.lists(st.lists(st.integers(0, 599), max_size=4), max_size=12), skip_special=st.booleans())
def test_what_was_fed_and_the_rest_make_the_whole_text(tokenizer, chunks, skip_special):
    decoder = StreamingDecoder(tokenizer, skip_special)
    text = "".join(decoder.feed(chunk) for chunk in chunks) + decoder.flush()
    assert text == tokenizer.decode([id for chunk in chunks for id in chunk], skip_special)


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
