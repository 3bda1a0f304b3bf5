"""Headings that a language model writes for a query, and passages below similar ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.expansion import HeadingWriter, headings_of, words_of
from bessemer.retrieval.index import IndexedDocument, build_index, open_index
from bessemer.retrieval.search import search
from bessemer.retrieval.store import Filter
from tests.serving.running import babbling_engine

pytest.importorskip("lancedb")

DOCUMENTS = [
    IndexedDocument("zip", "Yield tuples until an input is exhausted.", "zip(*iterables, strict=False)"),
    IndexedDocument("nlargest", "Find the n largest elements in a dataset.", "heapq.nlargest(n, iterable, key=None)"),
    IndexedDocument("heapify", "Transform list into a heap.", "heapq.heapify(heap, /)"),
    IndexedDocument("lists", "A list is a sequence.", "class list(iterable=(), /)"),
    IndexedDocument("wages", "# Pay\n\n## Overtime\n\nOn Sundays twice as much.", "Handbook", groups=("hr",)),
]


class Writer:
    """Writes the headings that it was made with."""

    def __init__(self, *headings: str) -> None:
        self.written = list(headings)
        self.examples: list[list[str]] = []

    def headings(self, query, examples):
        self.examples.append(list(examples))
        return self.written


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    build_index(DOCUMENTS, folder, IndexConfig(embedder="none"))
    return open_index(folder)


def test_a_heading_is_compared_without_its_parameters_and_by_its_innermost_part():
    assert headings_of("class list(iterable=(), /)", "") == ["list"]
    assert headings_of("Handbook", "Pay › Overtime") == ["Handbook › Pay › Overtime", "Overtime"]
    assert words_of("io.TextIOWrapper") == {"io", "textiowrapper", "text", "wrapper"}


def test_two_headings_are_similar_by_the_rarity_of_the_words_that_both_have(index):
    headings = index.headings
    # of the five headings heapq is in two, each other word in one: log(1 + 3.5 / 2.5) and log(1 + 4.5 / 1.5)
    common, rare = headings.rarity("heapq"), headings.rarity("nlargest")
    assert (common, rare) == pytest.approx((0.8755, 1.3863), abs=1e-4)
    assert headings.similarity("heapq.nlargest", "heapq.heapify") == pytest.approx(common / (common + rare))
    assert headings.similarity("heapq.nlargest", "HEAPQ nlargest") == 1 and headings.similarity("zip", "list") == 0
    assert headings.similarity("", "") == 0


def test_a_passage_without_a_word_of_the_question_is_found_by_its_heading(index):
    question = "How do I go through two lists side by side?"
    assert "zip" not in [hit.passage.document for hit in search(index, question)]
    writer = Writer("zip", "itertools.zip_longest")
    first, *_ = search(replace(index, expander=writer), question)
    assert first.passage.document == "zip" and first.scores["headings"] == 1 and "headings rank 1" in first.explanation
    # not of the document that only a group may see
    assert sorted(writer.examples[0]) == ["heapq.heapify", "heapq.nlargest", "list", "zip"]


def test_an_earlier_heading_counts_more_and_one_that_resembles_none_finds_nothing(index):
    assert [one.passage.document for one in index.headings.find(["heapify", "overtime", "zip"])][1:] == ["zip", "heapify"]
    assert index.headings.find(["numpy.linspace"]) == [] == index.headings.find([])


def test_headings_find_no_document_of_another_group(index):
    expanded = replace(index, expander=Writer("Overtime"))
    everybody = search(expanded, "working on weekends", where=Filter(groups=frozenset()))
    assert [hit.passage.document for hit in everybody] == []
    assert search(expanded, "working on weekends")[0].passage.document == "wages"


def test_only_the_fused_search_asks_the_model(index):
    writer = Writer("zip")
    search(replace(index, expander=writer), "heap", mode="words")
    assert writer.examples == []


def test_a_language_model_writes_headings_without_parameters_each_once(tmp_path, monkeypatch):
    engine = babbling_engine(tmp_path, context=2048)
    prompts = []

    def generate(batch, params):
        prompts.append((engine.tokenizer.decode(batch[0]), params.temperature))
        return [type("Completion", (), {"text": "`str.upper(s)`, str.upper, [Home office], , zip()"})()]

    writer = HeadingWriter(engine)
    assert all(isinstance(heading, str) for heading in writer.headings("in capitals?", ["heapq.heapify"]))
    monkeypatch.setattr(engine, "generate", generate)
    assert writer.headings("in capitals? " * 9000, ["heapq.heapify"]) == ["str.upper", "Home office", "zip"]
    assert writer.headings_of_each(["one?"], []) == [["str.upper", "Home office", "zip"]]
    (prompt, temperature), _ = prompts
    assert "heapq.heapify" in prompt and prompt.count("in capitals?") < 200 and temperature == 0
