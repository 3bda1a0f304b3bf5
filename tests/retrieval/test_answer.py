"""Answers from an index: no citation of nothing, sentences held to their sources, quotes at their bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import log

import pytest

from bessemer.inference.sampling.params import SamplingParams
from bessemer.retrieval.answer import (
    NOT_HELD,
    NearestJudge,
    answer_from,
    ask,
    best_source,
    calibrated_limit,
    checked,
    citing,
    evidence,
)
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import IndexedDocument, build_index, open_index
from bessemer.retrieval.search import Hit, search
from bessemer.retrieval.store import Passage
from tests.serving.running import babbling_engine

pytest.importorskip("lancedb")


def hit(number, text, cosine=0.5, start=100):
    passage = Passage(str(number), f"d{number}.md", 0, "", "", text, start, start + len(text.encode()), "notes")
    return Hit(passage, 1.0, {"meaning": 1}, {"meaning": cosine})


SOURCES = [hit(1, "Iron rusts in water. “Never leave it wet”, said the smith."), hit(2, "Copper turns green in air.")]


def test_a_text_of_the_grammar_cites_sources_that_are_there_alone():
    allowed = re.compile(citing(12))
    for text in ("Iron rusts [1].", "Both [2][12].", "No citation.", "Two\nlines [3]"):
        assert allowed.fullmatch(text), text
    for text in ("No [0].", "No [13].", "No [x].", "No [1", "No ]", "[[1]]"):
        assert not allowed.fullmatch(text), text


def test_a_sentence_is_held_to_the_sources_that_it_cites():
    answer = checked("Iron rusts in water [1]. Copper turns green in air [1]. Gold is heavy and costly. So?", SOURCES)
    assert [one.cited for one in answer.statements] == [(1,), (1,), (), ()]
    assert [one.is_supported for one in answer.statements] == [True, False, False, True]
    assert [one.support for one in answer.statements] == [1.0, 0.0, 0.0, None]
    assert answer.cited == [1]


def test_a_quote_comes_with_its_bytes_in_the_document():
    text = "Ähre. Iron rusts."
    answer = checked('It says "Iron rusts." and "copper never rusts" [1].', [hit(1, text, start=40)])
    (quote,) = answer.quotes
    assert (quote.text, quote.source) == ("Iron rusts.", 1)
    assert text.encode()[quote.start - 40 : quote.end - 40] == b"Iron rusts."


def test_a_limit_divides_questions_with_an_answer_from_those_without():
    assert calibrated_limit([0.6, 0.7, 0.8, 0.3], [0.1, 0.2, 0.4, 0.5]) == 0.6
    judge = NearestJudge(0.6)
    assert judge.holds("", [hit(1, "", 0.7)]) and not judge.holds("", [hit(1, "", 0.5), hit(2, "", 0.4)])


def test_a_similar_heading_speaks_for_an_answer_beside_the_cosine_and_bm25_does_not():
    near, named = hit(1, "", 0.5), replace(hit(2, "", 0.4), scores={"headings": 0.8})
    assert evidence([near, named]) == pytest.approx(0.5 + 0.5 * 0.8) and evidence([near]) == 0.5
    worded = replace(named, scores={"words": 12.0})
    assert evidence([worded]) is None and NearestJudge(0.6).holds("", [worded])


def test_an_engine_answers_with_citations_of_what_was_found_or_says_that_nothing_was(tmp_path):
    documents = [
        IndexedDocument("metal.md", "Iron rusts in water. See [7] for more. <|im_end|> is text."),
        IndexedDocument("copper.md", "Copper turns green in air, and iron does not."),
    ]
    build_index(documents, tmp_path / "i", IndexConfig(embedder="none"))
    index = open_index(tmp_path / "i")
    engine = babbling_engine(tmp_path / "engine", context=2048)
    for seed in range(8):
        params = SamplingParams(max_tokens=40, temperature=1.5, seed=seed)
        answer = ask(engine, index, "Does iron rust?", params=params)
        found = re.findall(r"\[[^\]]*\]?", answer.text)
        assert all(one in ("[1]", "[2]") or "]" not in one for one in found), answer.text
        assert {source.passage.document for source in answer.sources} == {"metal.md", "copper.md"}
    nothing = ask(engine, index, "zebra")
    assert (nothing.text, nothing.is_held, nothing.cited) == (NOT_HELD, False, [])


def test_sources_that_the_context_does_not_hold_are_left_out(tmp_path):
    documents = [IndexedDocument(f"{number}.md", f"Iron number {number}. " + "word " * 60) for number in range(5)]
    build_index(documents, tmp_path / "i", IndexConfig(embedder="none"))
    index = open_index(tmp_path / "i")
    assert len(search(index, "iron number", 5)) >= 1
    engine = babbling_engine(tmp_path / "engine", context=1024)
    answer = ask(engine, index, "Which iron number?", params=SamplingParams(max_tokens=8, temperature=0))
    assert 1 <= len(answer.sources) < 5


@dataclass(frozen=True)
class Score:
    total: float


class Reader:
    """An engine whose model refuses to answer from a source, read alone, with a given probability."""

    def __init__(self, refused):
        self.refused = refused
        self.tokenizer = self
        self.longest = 1000

    def apply_chat_template(self, messages, add_generation_prompt):
        return [messages[-1]["content"]]

    def encode(self, text, add_bos):
        return [text]

    def score_items(self, items):
        shown = [(prompt, only) for (prompt,), (only,) in items]
        assert all(text == NOT_HELD for ((text,),) in [(only,) for _, only in shown])
        return [[Score(log(next(p for name, p in self.refused.items() if name in prompt)))] for prompt, _ in shown]


def test_the_answer_is_of_the_source_that_holds_it_by_the_model_and_of_the_first_where_that_does_not_say():
    sources = [hit(1, "Iron rusts."), hit(2, "Copper turns green."), hit(3, "Zinc is grey.")]
    assert best_source(Reader({"Iron": 0.5, "Copper": 0.5, "Zinc": 0.5}), "What?", sources, 8) == 1
    assert best_source(Reader({"Iron": 0.999, "Copper": 0.001, "Zinc": 0.999}), "What?", sources, 8) == 2
    assert best_source(Reader({"Iron": 1.0, "Copper": 1.0, "Zinc": 0.0001}), "What?", sources, 8) == 3


def test_the_passages_of_a_section_have_one_rank_among_the_sources():
    beginning, rest, other = hit(1, "Iron rusts."), hit(1, "Zinc is grey."), hit(3, "Copper turns green.")
    odds = Reader({"Iron": 0.3, "Zinc": 0.9, "Copper": 0.9})
    assert best_source(odds, "What?", [rest, other, beginning], 8) == 3
    apart = replace(beginning, passage=replace(beginning.passage, headings="Another"))
    assert best_source(odds, "What?", [rest, other, apart], 8) == 1


class Writer(Reader):
    """Answers with a text, or, where it may choose, with the first choice."""

    def __init__(self, text, finish_reason="stop"):
        super().__init__({"": 0.5})
        self.text, self.finish_reason = text, finish_reason

    def chat(self, messages, params):
        return Said(params.choice[0] if params.choice else self.text, self.finish_reason)


@dataclass(frozen=True)
class Said:
    text: str
    finish_reason: str


@pytest.mark.parametrize(
    ("writer", "judge", "said"),
    [
        (Writer("Water makes iron rust."), None, "Water makes iron rust [1]."),
        # half of a sentence's words are enough, and one sentence of several
        (Writer("It is 12. Iron rusts."), None, "It is 12. Iron rusts [1]."),
        (Writer("The answer is 12."), None, "“Iron rusts in water” [1]."),
        (Writer("Water makes iron rust.", "length"), None, "“Iron rusts in water” [1]."),
        (Writer(NOT_HELD), None, NOT_HELD),
        (Writer(NOT_HELD), NearestJudge(0.1), "“Iron rusts in water” [1]."),
    ],
)
def test_an_answer_of_which_its_source_bears_out_no_sentence_becomes_a_quote(writer, judge, said):
    sources = [hit(1, "Iron rusts in water."), hit(2, "Copper turns green in air.")]
    assert answer_from(writer, "What?", sources, reading="each", judge=judge).text == said


@pytest.mark.parametrize("reading", ["together", "each"])
def test_a_quoted_answer_is_a_sentence_of_a_source_and_cites_it(tmp_path, reading):
    text = "Iron rusts in water. It melts at 1538 degrees."
    build_index([IndexedDocument("a.md", text)], tmp_path / "i", IndexConfig(embedder="none"))
    engine = babbling_engine(tmp_path / "engine", context=2048)
    index, params = open_index(tmp_path / "i"), SamplingParams(max_tokens=64, temperature=1.5, seed=3)
    answer = ask(engine, index, "Does iron rust?", params=params, reading=reading, quote=True)
    (quote,) = answer.quotes
    assert text.encode()[quote.start : quote.end].decode() == quote.text and answer.cited == [1]
    assert quote.text in ("Iron rusts in water", "It melts at 1538 degrees")
    # where the model babbles from one source, a sentence is cited that this source bears out, or none
    free = ask(engine, index, "Does iron rust?", params=params, reading=reading)
    assert set(free.cited) <= {1} and (reading == "together" or all(one.is_supported for one in free.statements if one.cited))


@pytest.mark.parametrize("reading", ["together", "each"])
def test_a_section_is_answered_from_and_quoted_at_its_bytes_as_far_as_the_context_holds_it(tmp_path, reading):
    text = "# Iron\n\nIron rusts in water.\n\n## Heat\n\nIt melts at 1538 degrees. " + "It is hot then. " * 600
    config = IndexConfig(embedder="none", passage_characters=120, overlap_characters=0)
    build_index([IndexedDocument("a.md", text)], tmp_path / "i", config)
    index, params = open_index(tmp_path / "i"), SamplingParams(max_tokens=64, temperature=1.5, seed=5)
    engine = babbling_engine(tmp_path / "engine", context=2048)
    said = set()
    for seed in range(12):
        seeded = params.with_changes(seed=seed)
        answer = ask(engine, index, "Does iron rust?", params=seeded, reading=reading, quote=True, section=400, count=1)
        (quote,) = answer.quotes
        assert text.encode()[quote.start : quote.end].decode() == quote.text and answer.cited == [1]
        assert len(answer.sources) == 1 and 100 < len(answer.sources[0].passage.text) <= 400
        said.add(quote.text)
    assert "It melts at 1538 degrees" in said
    # of a section that the context does not hold what was found is read, which the heading matches too
    answer = ask(engine, index, "Does iron rust?", params=params, reading=reading, quote=True, section=100_000, count=1)
    (source,) = answer.sources
    assert source.passage.text.startswith("Iron rusts in water.\n\n# Heat") and len(source.passage.text) < 400
    (quote,) = answer.quotes
    assert text.encode()[quote.start : quote.end].decode() == quote.text
