from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ArtefactError
from bessemer.data.deduplication.corpus import Corpus, parse_ids, write_ids
from bessemer.data.deduplication.methods import exact_duplicates, normalise_url, url_duplicates
from tests.data.deduplication.corpora import corpus_of, dropped, stream


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b ", "b", " b", "c"]), max_size=12), st.integers(1, 5), st.randoms(use_true_random=False)
)
def test_of_equal_texts_the_smallest_id_stays(texts, batch_rows, shuffled):
    order = list(range(len(texts)))
    shuffled.shuffle(order)
    first: dict[str, int] = {}
    expected = {}
    for number, text in enumerate(texts):
        if first.setdefault(text.strip(), number) != number:
            expected[number] = f"duplicate of {first[text.strip()]}"
    assert dropped(exact_duplicates(corpus_of(texts, order=order, batch_rows=batch_rows)), texts) == expected


def test_a_copy_of_an_earlier_document_goes_whatever_its_id():
    corpus = corpus_of({1: "a", 2: "b"}, earlier={7: "a", 8: "c", 9: "c"})
    assert dropped(exact_duplicates(corpus), {1: "a", 2: "b"}) == {1: "duplicate of 7"}


def test_a_document_that_the_earlier_corpus_has_under_the_same_id_is_its_copy():
    assert dropped(exact_duplicates(corpus_of({1: "a"}, earlier={1: "a"})), {1: "a"}) == {1: "duplicate of 1"}


def test_addresses_are_compared_once_normalised_and_missing_ones_never():
    urls = {0: "http://example.org/a", 1: None, 2: "https://www.example.org/a/#top", 3: None, 4: "", 5: "not an address"}
    texts = dict.fromkeys(urls, "x")
    assert dropped(url_duplicates(corpus_of(texts, url=urls)), texts) == {2: "duplicate url of 0"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("HTTPS://WWW.Example.org:443/Path/", "example.org/Path"),
        ("http://example.org", "example.org"),
        ("http://example.org/index.html?b=2&a=1&utm_source=x&fbclid=3#part", "example.org?a=1&b=2"),
        ("http://example.org//a///b", "example.org/a/b"),
        ("http://example.org/%7Euser/%C3%A9 x", "example.org/~user/%C3%A9%20x"),
        ("http://user:secret@example.org:8080/", "example.org:8080"),
        ("mailto:someone@example.org", None),
        ("http://[broken", None),
        ("http://example.org:port/", None),
        ("relative/path", None),
    ],
)
def test_normalised_addresses(url, expected):
    assert normalise_url(url) == expected


@settings(deadline=None)
@given(st.text())
@example(" #")
@example("www.www.a")
def test_normalising_any_text_raises_nothing_and_is_final(text):
    normalised = normalise_url("http://" + text)
    if normalised is not None:
        assert normalise_url("http://" + normalised) == normalised


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**128 - 1)))
def test_ids_come_back_from_numbers(numbers):
    ids = [f"{number:032x}" for number in numbers]
    halves = parse_ids(pa.array(ids, pa.string()))
    assert write_ids(halves) == ids
    assert [int(high) << 64 | int(low) for high, low in halves] == numbers


@pytest.mark.parametrize("identity", ["abc", "g" * 32, "A" * 32, "0" * 33])
def test_other_ids_are_refused(identity):
    with pytest.raises(ArtefactError, match="an id of a document is not"):
        parse_ids(pa.array([identity]))


def test_an_id_that_occurs_twice_is_refused():
    with pytest.raises(ArtefactError, match=r"two documents have the id 0{31}1"):
        Corpus.of(stream({1: "a"}, order=[1, 1]))


def test_batches_are_cut_where_their_text_is_long():
    texts = ["a" * (7 << 20)] * 5 + ["b" * (40 << 20), "c"]
    found = [(numbers.tolist(), len(rows)) for numbers, rows in corpus_of(texts, batch_rows=100).batches()]
    assert [number for numbers, _ in found for number in numbers] == list(range(7))
    sizes = [sum(len(texts[number]) for number in numbers) for numbers, _ in found if 5 not in numbers]
    assert max(sizes) <= (16 << 20) + (7 << 20)
    assert [count for _, count in found] == [len(numbers) for numbers, _ in found]
    assert len(found) > 2
