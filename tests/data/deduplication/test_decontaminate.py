from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import SourceError
from bessemer.data.deduplication.decontaminate import Contamination, Item, read_items
from tests.data.deduplication import reference
from tests.data.deduplication.corpora import applied, dropped

EVALUATION = Path(__file__).parents[4] / "shared" / "data" / "eval"
QUESTION = "Which of these gases in the air do plants take in through their leaves when the sun shines?"


def test_thirteen_words_in_a_row_name_the_set_and_the_item():
    index = Contamination.of([Item("arc", "12", QUESTION), Item("piqa", "3", "How do I ready a guinea pig cage?")])
    page = "Homework. which of THESE gases -- in the air -- do plants take in through their leaves. Good luck."
    texts = [page, page.replace("gases", "things"), "Nothing of the kind."]
    assert dropped(index, texts) == {0: "overlap with arc, item 12"}


def test_a_short_item_counts_as_a_whole_and_a_very_short_one_never():
    index = Contamination.of([Item("copa", "1", "The man turned on the faucet, therefore"), Item("x", "1", "1 + 1 = 2")])
    texts = ["The man turned on the faucet therefore it rained", "1 + 1 = 2"]
    assert dropped(index, texts) == {}
    index = Contamination.of([Item("copa", "1", "The man turned on the faucet, therefore")], least_words=7)
    assert dropped(index, texts) == {0: "overlap with copa, item 1"}


def test_digits_count():
    index = Contamination.of([Item("sums", "1", QUESTION.replace("sun", "17"))])
    assert dropped(index, [QUESTION.replace("sun", "18")[37:]]) == {}
    assert dropped(index, [QUESTION.replace("sun", "17")[5:]]) == {0: "overlap with sums, item 1"}


def test_masking_takes_out_the_overlap_alone():
    index = Contamination.of([Item("arc", "12", QUESTION)], mask=True, least_words_left=3)
    texts = [f"A page begins here. {QUESTION} And it goes on.", f"Only: {QUESTION}", "Untouched  text."]
    assert applied(index, texts) == {
        0: ("A page begins here. ? And it goes on.", None),
        1: (texts[1], "overlap with arc, item 12"),
        2: (texts[2], None),
    }


CHINESE = "生铁大约含有百分之四的碳，所以它坚硬而易碎，几乎无法锻造，贝塞麦把空气吹进铁水。"
THAI = "เหล็กดิบมีคาร์บอนประมาณสี่เปอร์เซ็นต์จึงแข็งแต่เปราะและตีขึ้นรูปได้ยากกว่าเหล็กกล้าที่ใช้กันทั่วไป"


@pytest.mark.parametrize(("item", "shared", "enough"), [(CHINESE, 20, 32), (THAI, 40, 75)])
def test_in_scripts_without_spaces_a_run_is_as_long_as_thirteen_words(item, shared, enough):
    """A phrase that any page may have, though of more characters than thirteen, is no overlap; a sentence is."""
    index = Contamination.of([Item("set", "1", item)])
    texts = [f"前言。{item[3 : 3 + shared]}。以后。", f"前言。{item[3 : 3 + enough]}。以后。"]
    assert dropped(index, texts) == {1: "overlap with set, item 1"}


def test_a_short_item_without_spaces_counts_as_a_whole_from_eight_words_on():
    named = [
        Item("set", "1", "贝塞麦把空气吹进铁水以后得到了钢"),
        Item("set", "2", "中华人民共和国"),
        Item("set", "3", "北京市海淀区中关村"),
    ]
    index = Contamination.of([*named, Item("set", "4", "ベッセマーは溶けた鉄に空気を吹き込み良い鋼を作りました")])
    texts = [
        "他说贝塞麦把空气吹进铁水以后得到了钢。",
        "中华人民共和国北京市海淀区中关村大街",
        "ベッセマーは溶けた鉄に空気を吹き込み良い鋼を作りましたか",
    ]
    assert dropped(index, texts) == {0: "overlap with set, item 1", 2: "overlap with set, item 4"}


def test_masking_takes_out_the_overlap_in_mixed_scripts():
    index = Contamination.of([Item("set", "1", f"iron and 钢 {CHINESE}")], mask=True, least_words_left=3)
    assert applied(index, [f"Steel, iron and 钢 {CHINESE[:-1]}, or none of these words"]) == {
        0: ("Steel, , or none of these words", None)
    }


WORDS = st.lists(st.sampled_from("abcde"), max_size=25).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(st.lists(WORDS, max_size=4), st.lists(WORDS, max_size=3), st.integers(2, 6), st.integers(1, 6), st.randoms())
def test_overlaps_are_those_of_pythons_sets(items, texts, ngram, least_words, shuffled):
    least_words = min(least_words, ngram)
    named = [Item("set", str(number), text) for number, text in enumerate(items)]
    shuffled.shuffle(named)
    index = Contamination.of(named, ngram=ngram, least_words=least_words)
    runs: dict[tuple[str, ...], int] = {}
    for number, item in enumerate(items):
        words = reference.words(item, "words")
        length = min(len(words), ngram)
        for start in range(len(words) - length + 1 if length >= least_words else 0):
            runs.setdefault(tuple(words[start : start + length]), number)
    expected = {}
    for number, text in enumerate(texts):
        words = text.split()
        found = [
            (start, runs[tuple(words[start : start + length])])
            for start in range(len(words))
            for length in range(1, ngram + 1)
            if start + length <= len(words) and tuple(words[start : start + length]) in runs
        ]
        if found:
            expected[number] = f"overlap with set, item {min(found)[1]}"
    assert dropped(index, texts) == expected


def test_items_of_a_file(tmp_path):
    path = tmp_path / "quiz.jsonl"
    records = [
        {"query": "Question: Who?", "choices": ["He", "She"], "gold": 0},
        {"id": "b-7", "deep": {"text": "Why? Answer:"}},
    ]
    path.write_text("\n\n".join(json.dumps(record) for record in records), encoding="utf-8")
    assert list(read_items(path)) == [
        Item("quiz", "1", "Who?"),
        Item("quiz", "1", "He"),
        Item("quiz", "1", "She"),
        Item("quiz", "b-7", "Why?"),
    ]
    assert next(read_items(path, "other")).set == "other"


def test_a_broken_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "quiz.jsonl"
    path.write_text('{"query": "x"}\n{"query":\n', encoding="utf-8")
    with pytest.raises(SourceError, match=r"quiz\.jsonl, line 2: this is not a set of evaluation items"):
        list(read_items(path))
    with pytest.raises(SourceError, match=r"missing\.jsonl"):
        list(read_items(tmp_path / "missing.jsonl"))


def test_lengths_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="least_words is from 1 to ngram, 5, not 6"):
        Contamination.of([], ngram=5, least_words=6)


def test_without_items_nothing_overlaps():
    assert dropped(Contamination.of([]), [QUESTION]) == {}


@pytest.mark.skipif(not EVALUATION.exists(), reason="the public evaluation sets are not on this machine")
def test_a_page_that_quotes_a_real_item_is_found_and_prose_is_not():
    items = [item for path in sorted(EVALUATION.glob("*.jsonl")) for item in read_items(path)]
    index = Contamination.of(items)
    quoted = "As the test says: which statement best explains why photosynthesis is the foundation of most food webs? Yes."
    _, reasons = index.apply(pa.nulls(2, pa.string()), pa.array([quoted, "The furnace has to be heated with care. " * 20]))
    assert reasons.to_pylist() == ["overlap with arc_easy, item 1", None]
