from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from bessemer.core.errors import ConfigError
from bessemer.data.deduplication.corpus import Corpus, Preference
from bessemer.data.deduplication.methods import exact_duplicates
from bessemer.data.deduplication.near import near_duplicates
from bessemer.data.deduplication.passages import repeated_lines, repeated_substrings
from bessemer.data.deduplication.removals import SpanCollector, after, span_type
from bessemer.data.deduplication.semantic import semantic_duplicates
from tests.cases import slow
from tests.data.deduplication.corpora import applied, corpus_of, dropped, stream

LINE = "Air that is blown through the melt burns the carbon of the pig iron nearly all away."
TEXTS = dict.fromkeys(range(5), LINE)


def survivor(preference, **columns):
    corpus = Corpus.of(stream(TEXTS, **columns), None, preference)
    found = dropped(exact_duplicates(corpus), TEXTS)
    (stays,) = set(TEXTS) - set(found)
    assert set(found.values()) == {f"duplicate of {stays}"}
    return stays


@pytest.mark.parametrize(
    ("preference", "licenses", "quality", "stays"),
    [
        (Preference(), {}, {}, 0),
        (Preference(), {3: "MIT", 4: "CC0-1.0"}, {}, 3),  # a stated one before none
        (Preference(["CC0-1.0"]), {1: "MIT", 4: "CC0-1.0"}, {}, 4),
        (Preference(["CC0-1.0"], ["good"]), {1: "MIT", 2: "MIT"}, {0: "0.9", 1: "0.1", 2: "0.2"}, 2),  # licence first
        (
            Preference(quality=["good"]),
            {},
            {2: "0.5", 3: "0.5", 4: "0.4"},
            2,
        ),  # of equals the smallest id, a missing score last
        (Preference(quality=["-good"]), {}, {2: "0.5", 3: "0.3"}, 3),
    ],
)
def test_of_copies_the_one_with_the_best_licence_then_quality_then_the_smallest_id_stays(preference, licenses, quality, stays):
    assert survivor(preference, license=licenses, good=quality) == stays


def test_an_earlier_corpus_stays_whatever_its_licence():
    corpus = Corpus.of(stream({1: LINE, 2: LINE}, license={2: "MIT"}), stream({9: LINE}), Preference())
    assert dropped(exact_duplicates(corpus), {1: LINE, 2: LINE}) == {1: "duplicate of 9", 2: "duplicate of 9"}


@pytest.mark.parametrize(
    "method",
    [
        lambda corpus, scratch: near_duplicates(corpus, scratch).duplicates,
        slow(lambda corpus, scratch: semantic_duplicates(corpus, scratch, clusters=1, threshold=0.8)),
        lambda corpus, scratch: repeated_lines(corpus, scratch),
        lambda corpus, scratch: repeated_substrings(corpus, scratch, length=8),
    ],
    ids=["near", "semantic", "lines", "substrings"],
)
def test_every_method_keeps_the_preferred_copy(tmp_path, method):
    shared = f"{LINE} " + " ".join(f"word{chr(97 + n // 9)}{chr(97 + n % 9)}" for n in range(80))
    texts = {number: f"{shared}\n\n{name}" for number, name in enumerate(["alpha", "beta", "gamma", "delta"])} | {4: shared}
    corpus = Corpus.of(stream(texts, license={2: "MIT", 4: "MIT"}), None, Preference(["MIT"]))
    found = applied(method(corpus, tmp_path), texts)
    assert [number for number, (text, reason) in found.items() if reason is None and shared in text] == [2]


def test_the_order_holds_for_what_a_method_leaves(tmp_path):
    texts = {0: LINE, 1: LINE.upper(), 2: LINE.upper(), 3: LINE}
    corpus = Corpus.of(stream(texts, license={2: "MIT", 3: "MIT"}), None, Preference())
    exact = exact_duplicates(corpus)
    assert dropped(exact, texts) == {0: "duplicate of 3", 1: "duplicate of 2"}
    near = near_duplicates(after(corpus, exact), tmp_path).duplicates
    assert dropped(near, texts) == {3: "near duplicate of 2 (1.00)"}


def test_a_quality_that_is_no_score_is_refused():
    schema = pa.schema([("id", pa.string()), ("license", pa.string()), ("spam_score", pa.float64())])
    Preference(quality=["-spam_score"]).check(schema)
    for name in ("spam_scores", "license"):
        with pytest.raises(ConfigError, match=f"no score '{name}'"):
            Preference(quality=[name]).check(schema)


def test_documents_beyond_32_bits_keep_their_numbers(tmp_path):
    """Of a corpus of which nothing but the number of documents is there."""
    many = (1 << 32) + 8
    corpus = Corpus(lambda columns: [], None, np.broadcast_to(np.zeros((1, 2), np.uint64), (many, 2)), 0)
    assert corpus_of(["a"]).number_type == np.uint32
    collector = SpanCollector(corpus, tmp_path)
    spans = np.zeros(2, dtype=span_type(corpus))
    spans["number"], spans["end"] = np.array([3, (1 << 32) + 3]), 5
    collector.add(spans)
    assert collector.close("too little", 0).offsets.tolist() == [0, 1, 2]
