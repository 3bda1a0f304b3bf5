"""Documents found where they lie."""

import pyarrow as pa
import pytest

from bessemer.core.errors import RequestError
from bessemer.data.corpus.reader import SCHEMA, VALIDATION, document_id
from bessemer.data.corpus.search import Query, duplicate_groups, facets, passages, ranked, search
from bessemer.data.corpus.writer import write_documents
from bessemer.data.text.texts import hash_text

REASONS = (None, "gopher: words 29 < 50", "gopher: words 3 < 50", "language: de 0.93")


def rows(texts, reasons=None):
    made = [
        {
            "id": document_id("books" if number % 3 else "letters", str(number)),
            "text": text,
            "text_hash": hash_text(text),
            "source": "books" if number % 3 else "letters",
            "url": None,
            "language": "en",
            "license": None,
            "split": "train",
            "metadata": [],
            "length": float(len(text)) if number else None,
            **({"reason": reasons[number % len(reasons)]} if reasons else {}),
        }
        for number, text in enumerate(texts)
    ]
    extra = [pa.field("length", pa.float64()), *([pa.field("reason", pa.string())] if reasons else [])]
    return pa.RecordBatch.from_pylist(made, schema=pa.schema([*SCHEMA, *extra]))


def write(folder, batch):
    write_documents(folder, [batch], batch.schema)


TEXTS = [f"The {'steel ' * (number % 7)}of number {number} is {'hot' if number % 2 else 'cold'}." for number in range(60)]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, rows(TEXTS))
    return tmp_path


def everything(folder, query, limit):
    """Texts page by page."""
    start, found = 0, []
    while start is not None:
        page = search(folder, query, start=start, limit=limit)
        assert len(page.rows) <= limit
        found += [row["text"] for row in page.rows]
        start = page.next
    return found


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_pages_of_any_size_give_every_match_once(folder, limit):
    expected = [text for number, text in enumerate(TEXTS) if "HOT".lower() in text and number % 3 and len(text) >= 30]
    found = everything(folder, Query(text="HOT", source="books", column="length", low=30), limit)
    assert sorted(found) == sorted(expected)


def test_what_lacks_a_score_is_in_no_range_and_nothing_else_is_lost(folder):
    assert len(everything(folder, Query(), 9)) == 60
    assert len(everything(folder, Query(column="length", low=0), 9)) == 59


def test_an_order_by_score_is_that_of_all_documents(folder):
    lengths = sorted((len(text) for text in TEXTS[1:]), reverse=True)
    pages = [ranked(folder, Query(), "length", descending=True, start=start, limit=10) for start in (0, 10, 50)]
    assert [row["length"] for row in pages[0].rows + pages[1].rows] == lengths[:20]
    assert pages[0].next == 10 and pages[2].next is None and len(pages[2].rows) == 9
    assert [row["length"] for row in ranked(folder, Query(), "length", descending=False, limit=3).rows] == lengths[:-4:-1]


@pytest.mark.parametrize("query", [Query(column="text"), Query(column="wit"), Query(rule="gopher")])
def test_a_column_that_is_not_there_is_named(folder, query):
    with pytest.raises(RequestError, match="these documents have no"):
        search(folder, query)


def test_long_texts_are_shown_around_what_was_searched_for(tmp_path):
    write(tmp_path, rows(["x" * 5000 + " Needle " + "y" * 5000]))
    (row,) = search(tmp_path, Query(text="needle")).rows
    assert "Needle" in row["text"] and len(row["text"]) < 400 and row["characters"] == 10_008
    assert row["text"][0] == "x" and row["text_start"] > 4000


def test_reasons_are_counted_and_found_without_their_figures(tmp_path):
    write(tmp_path, rows(TEXTS, REASONS[1:]))
    found = facets(tmp_path)
    assert found.rules == {"gopher: words": 40, "language": 20} and found.scores == ["length"] and found.is_whole
    assert found.sources == {"books": 40, "letters": 20}
    assert len(everything(tmp_path, Query(rule="gopher: words"), 100)) == 40


def test_duplicates_are_grouped_by_the_one_that_stays(tmp_path):
    one, other = document_id("a", "1"), document_id("a", "2")
    reasons = [
        f"near duplicate of {one} (0.87)",
        f"duplicate of {other}",
        f"near duplicate of {one} (0.95)",
        "language: de 0.9",
    ]
    write(tmp_path, rows(TEXTS[:8], reasons))
    first, second = duplicate_groups(tmp_path)
    assert (first[0], first[1]) == (one, 4) and [one.similarity for one in first[2]] == [0.95, 0.95, 0.87, 0.87]
    assert (second[0], second[1], second[2][0].similarity) == (other, 2, None)


def test_the_longest_ending_that_stands_in_a_document_is_found(tmp_path):
    texts = ["the raw iron is hot", "cold iron is hot today", "is hot", "is cold"]
    write(tmp_path, rows(texts))
    found, looked_at, documents = passages(tmp_path, ["the raw iron is hot", "iron is hot", "is hot"], limit=2)
    assert [(one.needle, one.found) for one in found] == [(0, "the raw iron is hot"), (1, "iron is hot")]
    assert (found[1].left, found[1].right) == ("cold ", " today") and (looked_at, documents) == (4, 4)
    assert passages(tmp_path, ["molten"])[0] == []
    assert passages(tmp_path, ["is hot"], split=VALIDATION) == ([], 0, 0)
