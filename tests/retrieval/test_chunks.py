"""Passages: whole blocks under their headings, with places that give the text back."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.retrieval.chunks import blocks_of, cut_document, sentences

PAGE = """# Iron

Iron is a metal. It rusts in water and air.

## Smelting

Ore is heated with coke.

```python
def heat(ore):

    return ore + 1
```

| metal | melts |
|-------|-------|
| iron  | 1538  |

Other metals
------------

Copper melts at 1085 °C.
"""


def test_blocks_have_the_headings_above_them_and_code_and_tables_are_one():
    blocks = [(PAGE[block.span.start : block.span.end].strip(), block.headings, block.is_whole) for block in blocks_of(PAGE)]
    assert [headings for _, headings, _ in blocks] == [
        ("Iron",),
        ("Iron", "Smelting"),
        ("Iron", "Smelting"),
        ("Iron", "Smelting"),
        ("Iron", "Other metals"),
    ]
    assert blocks[2][0].startswith("```python") and blocks[2][0].endswith("```") and blocks[2][2]
    assert blocks[3][0].count("\n") == 2 and blocks[3][2]


def test_a_passage_stays_below_its_headings_and_its_bytes_are_its_text():
    chunks = cut_document(PAGE, longest=200, overlap=30)
    assert [chunk.headings[-1] for chunk in chunks] == ["Iron", "Smelting", "Other metals"]
    data = PAGE.encode()
    assert all(data[chunk.start : chunk.end].decode() == chunk.text for chunk in chunks)
    assert "1085 °C" in chunks[-1].text


def test_a_long_block_is_cut_between_sentences_and_neighbours_share_whole_ones():
    text = " ".join(f"Sentence number {number} says little." for number in range(20))
    chunks = cut_document(text, longest=150, overlap=60)
    assert all(chunk.text.startswith("Sentence") and chunk.text.endswith("little.") for chunk in chunks)
    for before, after in pairwise(chunks):
        shared = before.end - after.start
        assert 0 < shared <= 60 and before.text.endswith(after.text[:shared].strip())


@pytest.mark.parametrize("text", ["", " \n\n", "# only a heading\n"])
def test_a_text_without_content_has_no_passage(text):
    assert cut_document(text) == []


def test_sentences_end_at_marks_of_several_scripts_and_not_at_abbreviations_before_small_letters():
    text = "He came (cf. p. 3) late. “Why?” she asked. 今日は雨。明日は晴れ。वह आया। मैं गया।"
    assert [text[span.start : span.end].strip() for span in sentences(text)] == [
        "He came (cf. p. 3) late.",
        "“Why?” she asked.",
        "今日は雨。",
        "明日は晴れ。",
        "वह आया।",
        "मैं गया।",
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["# a\n", "word ", "two. Three", "\n\n", "```\n", "| a |\n", "é漢🙂", "x" * 70, "---\n"]), max_size=40
    )
)
def test_every_word_outside_headings_is_in_a_passage_that_is_short_enough(parts):
    text = "".join(parts)
    chunks = cut_document(text, longest=60, overlap=20)
    data = text.encode()
    assert all(data[chunk.start : chunk.end].decode() == chunk.text and 0 < len(chunk.text) <= 60 for chunk in chunks)
    covered = {place for chunk in chunks for place in range(chunk.start, chunk.end)}
    for block in blocks_of(text):
        start, end = (len(text[:place].encode()) for place in block.span)
        assert all(place in covered or data[place : place + 1].isspace() for place in range(start, end))


def test_an_overlap_that_is_not_below_half_is_refused():
    with pytest.raises(ValueError, match="below half"):
        cut_document("a", longest=100, overlap=50)
