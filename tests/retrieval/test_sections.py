"""A hit as its section: what is joined, where it stands, and what the context leaves of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.retrieval.answer import fitting_sources
from bessemer.retrieval.citations import CitationReader, quotable, quotes_in
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import IndexedDocument, build_index, open_index, passages_of
from bessemer.retrieval.search import Hit, search
from bessemer.retrieval.sections import joined, with_neighbours, with_section
from bessemer.retrieval.store import PassagePlace

pytest.importorskip("lancedb")

TEXT = """Preface of the handbook, for all.

# Holidays

There are **thirty** days of holiday – a year.

## Carried over

Five days may be carried over into the next year.

### When

Until the end of Märch they must be taken.

## Unpaid

Unpaid leave is agreed with the manager.

# Notice

The notice period is four weeks.
"""
CONFIG = IndexConfig(embedder="none", passage_characters=100, overlap_characters=40)


class Stored:
    """The passages of a document, as a store gives them."""

    def __init__(self, passages):
        self.passages = passages

    def places_of(self, document):
        return [PassagePlace(one.number, one.headings, one.start, one.end) for one in self.passages]

    def of_document(self, document, numbers):
        return [one for one in self.passages if one.number in set(numbers)]


def passages(text, config=CONFIG):
    return passages_of(IndexedDocument("a.md", text), config)


def containing(found, words):
    return next(one for one in found if words in one.text)


def check_places(passage, text):
    """What a passage says of its places holds, to the byte."""
    raw = text.encode()
    for part in passage.parts:
        said = passage.text[part.text_start : part.text_end]
        assert raw[part.start : part.start + len(said.encode())].decode() == said


def test_a_hit_is_the_section_below_its_heading_with_what_is_below_that():
    found = passages(TEXT)
    wide = with_section(Stored(found), containing(found, "Five days"), 1000)
    assert wide.headings == "Holidays › Carried over"
    assert wide.text == (
        "Five days may be carried over into the next year.\n\n# When\n\nUntil the end of Märch they must be taken."
    )
    check_places(wide, TEXT)


def test_a_passage_that_is_its_whole_section_becomes_the_one_above():
    found = passages(TEXT)
    wide = with_section(Stored(found), containing(found, "Unpaid leave"), 1000)
    assert wide.headings == "Holidays" and wide.text.startswith("There are **thirty**")
    assert "# Carried over › When\n\nUntil" in wide.text and "notice" not in wide.text
    check_places(wide, TEXT)
    # the document is the section of what has no heading
    assert with_section(Stored(found), found[0], 1000).text.endswith("# Notice\n\nThe notice period is four weeks.")


def test_a_section_above_that_is_too_long_leaves_the_passage_and_its_own_is_cut_around_it():
    found = passages(TEXT)
    alone = containing(found, "Unpaid leave")
    assert with_section(Stored(found), alone, 100) == alone
    text = "# Long\n\n" + " ".join(f"Sentence {number} is about topic{number}." for number in range(60))
    long = passages(text)
    middle = containing(long, "topic30")
    wide = with_section(Stored(long), middle, 400)
    assert 250 < len(wide.text) <= 400 and "topic30" in wide.text and wide.text in text
    assert wide.start < middle.start and wide.end > middle.end
    assert with_section(Stored(long), middle, 10) == middle


@given(
    blocks=st.lists(
        st.one_of(
            st.integers(1, 4).map(lambda level: "#" * level + f" Heading {level}"),
            st.lists(st.sampled_from(["Märch is cold.", "雪が降る。", "One.", "A word"]), min_size=1, max_size=9).map(" ".join),
        ),
        min_size=1,
        max_size=14,
    ),
    most=st.integers(0, 600),
    neighbours=st.integers(0, 3),
    gap=st.sampled_from(["\n\n", "\n\n\n \n"]),
)
@settings(max_examples=60, deadline=None)
def test_of_any_document_the_parts_of_a_section_stand_at_their_bytes(blocks, most, neighbours, gap):
    text = gap.join(blocks)
    found = passages(text)
    for one in found:
        for wide in (with_section(Stored(found), one, most), with_neighbours(Stored(found), one, neighbours)):
            check_places(wide, text)
            assert wide.start <= one.start and one.end <= wide.end and wide.id == one.id
            assert wide == one or len(wide.text) <= most or wide.headings == one.headings
            # nothing stands twice
            places = [
                (part.start, part.start + len(wide.text[part.text_start : part.text_end].encode())) for part in wide.parts
            ]
            assert all(before[1] <= after[0] for before, after in pairwise(places))


def test_a_citation_and_a_quote_of_a_section_stand_at_their_bytes_and_its_headings_are_no_quotes():
    found = passages(TEXT)
    hit = Hit(with_section(Stored(found), containing(found, "Unpaid leave"), 1000), 1.0, {}, {})
    raw = TEXT.encode()
    (citation,) = CitationReader([hit]).feed("They must be taken until the end of March [1].")
    assert raw[citation.start : citation.end].decode() == citation.quote == "Until the end of Märch they must be taken."
    said = "It says “Unpaid leave is agreed with the manager”, “carried over › When” and “into the next year. # When Until”."
    (quote,) = quotes_in(said, [hit])
    assert raw[quote.start : quote.end].decode() == quote.text == "Unpaid leave is agreed with the manager"
    for answer in quotable([hit]):
        assert len(list(quotes_in(answer, [hit]))) == 1, answer
    # an answer with none of the words cites all of it
    (whole,) = CitationReader([hit]).feed("Zebra [1]")
    assert (whole.start, whole.end) == (hit.passage.start, hit.passage.end)


def test_what_is_found_in_one_section_is_one_hit_and_the_others_follow(tmp_path):
    other = IndexedDocument("b.md", "# Leave\n\nUnpaid leave and days carried over, elsewhere.")
    build_index([IndexedDocument("a.md", TEXT), other], tmp_path / "i", CONFIG)
    index = open_index(tmp_path / "i")
    found = search(index, "thirty or unpaid leave", 2, section=1000)
    assert {hit.passage.document for hit in found} == {"a.md", "b.md"}
    (wide,) = (hit for hit in found if hit.passage.document == "a.md")
    assert [one.headings for one in wide.found] == ["Holidays › Unpaid", "Holidays"] and len(wide.narrowed.passage.text) < len(
        wide.passage.text
    )
    check_places(wide.narrowed.passage, TEXT)
    assert wide.details["found"] == [[one.start, one.end] for one in wide.found]
    assert wide.narrowed.found == () and wide.narrowed.narrowed == wide.narrowed
    (plain,) = search(index, "notice", 1)
    assert plain.narrowed == plain


def test_of_sections_that_the_context_does_not_hold_what_was_found_is_read():
    found = passages(TEXT)
    hits = []
    for words in ("Five days", "Unpaid leave", "notice period"):
        passage = containing(found, words)
        hits.append(Hit(with_section(Stored(found), passage, 1000), 1.0, {}, {}, found=(passage,)))
    lengths = [(len(hit.passage.text), len(hit.narrowed.passage.text)) for hit in hits]

    def within(characters):
        return lambda sources: sum(len(hit.passage.text) for hit in sources) <= characters

    assert fitting_sources(hits, within(10_000)) == hits
    all_narrow = sum(narrow for _, narrow in lengths)
    first_wide = all_narrow - lengths[0][1] + lengths[0][0]
    used = fitting_sources(hits, within(first_wide))
    assert used[0] == hits[0] and used[1:] == [hit.narrowed for hit in hits[1:]]
    assert fitting_sources(hits, within(lengths[0][1])) == [hits[0].narrowed] == fitting_sources(hits, within(1))


def test_passages_of_other_headings_are_joined_below_a_line_that_names_them():
    found = passages(TEXT)
    first, last = containing(found, "Until the end"), containing(found, "notice period")
    both = joined([first, last], first)
    check_places(both, TEXT)
    assert both.headings == "Holidays › Carried over › When" and both.text == f"{first.text}\n\n# Notice\n\n{last.text}"
