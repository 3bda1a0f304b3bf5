import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ArtefactError
from bessemer.data.corpus.reader import SCHEMA, document_id
from bessemer.data.corpus.writer import write_documents
from bessemer.evaluation.contamination import (
    TaskItem,
    by_task,
    contamination,
    contamination_table,
    corpus_texts,
    find_corpus,
)
from bessemer.evaluation.evaluation_folder import Score

EVALUATION = Path(__file__).parents[3] / "shared" / "data" / "eval"
QUESTION = "Which of these gases in the air do plants take in through their leaves when the sun shines?"


def found(texts, *batches, **options):
    (item,) = contamination([TaskItem("quiz", "1", texts)], [pa.array(batch, pa.string()) for batch in batches], **options)
    return item.shared, item.ngrams


def test_an_item_that_a_page_holds_is_found_whole_and_a_half_of_it_in_part():
    words = QUESTION.split()
    assert len(words) == 18
    assert found([QUESTION], [f"Homework: {QUESTION.upper()} Good luck!"]) == (6, 6)
    assert found([QUESTION], [" ".join(words[:15])]) == (3, 6)
    assert found([QUESTION], [" ".join(words[:12])]) == (0, 6)


def test_parts_in_different_documents_and_batches_add_up_and_repeats_count_once():
    words = QUESTION.split()
    first, last = " ".join(words[:14]), " ".join(words[-14:])
    assert found([QUESTION], [first, first], [first, last]) == (4, 6)
    assert found([QUESTION, QUESTION], [first]) == (2, 6)


def test_the_texts_of_an_item_are_not_joined():
    first, second = " ".join(QUESTION.split()[:7]), " ".join(QUESTION.split()[7:])
    assert found([first, second], [QUESTION]) == (1, 1)


def test_short_texts_count_whole_from_eight_words_and_shorter_ones_are_unknown():
    eight, seven = " ".join(QUESTION.split()[:8]), " ".join(QUESTION.split()[:7])
    assert found([eight], [QUESTION]) == (1, 1)
    assert found([eight], [seven]) == (0, 1)
    assert found([seven], [QUESTION]) == (0, 0)
    assert found([seven], [QUESTION], least_words=7) == (1, 1)


@settings(max_examples=30)
@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.lists(st.sampled_from("abcd"), max_size=12), max_size=4))
def test_counts_are_those_of_sets_of_tuples(item, documents):
    def ngrams(words):
        return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}

    expected = ngrams(item)
    in_corpus = set().union(*map(ngrams, documents))
    assert found([" ".join(item)], [" ".join(words) for words in documents], ngram=3, least_words=3) == (
        len(expected & in_corpus),
        len(expected),
    )


def test_an_item_is_dirty_from_one_ngram_or_from_the_share_that_is_asked():
    items = [TaskItem("quiz", "1", [QUESTION])]
    half = [pa.array([" ".join(QUESTION.split()[:15])])]
    assert contamination(items, half)[0].dirty
    assert contamination(items, half, least_share=0.5)[0].dirty
    assert not contamination(items, half, least_share=0.7)[0].dirty
    assert not contamination(items, [pa.array(["Nothing of the kind."])])[0].dirty


def test_scores_are_told_apart_by_what_the_corpus_holds():
    texts = [f"{QUESTION} And what is left of number {number} when the night comes again?" for number in range(40)]
    items = [TaskItem("quiz", str(number), [text]) for number, text in enumerate(texts)]
    items += [TaskItem("quiz", "short", ["1 + 1 ="]), TaskItem("other", "1", [])]
    scores = {"quiz": {str(number): Score(float(number < 10), None) for number in range(40)}}
    shared_opening = contamination(items, [pa.array(texts[:10])], least_share=0.9)
    quiz, other = by_task(shared_opening, scores)
    assert (quiz.dirty, quiz.clean, quiz.unknown) == (10, 30, 1)
    assert (quiz.dirty_score.mean, quiz.clean_score.mean, quiz.score.mean) == (1, 0, 0.25)
    assert (other.unknown, other.score, other.dirty_score) == (1, None, None)
    row = contamination_table([quiz]).rows[0]
    assert (row[1].text, row[1].remark) == ("10 of 41", "1 too short")


def test_half_a_surrogate_pair_in_an_item_does_no_harm():
    assert found([f"\ud83d {QUESTION}"], [QUESTION]) == (6, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"least_words": 0}, "least_words"), ({"ngram": 5}, "least_words"), ({"least_share": 2}, "least_share")],
)
def test_limits_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        found([QUESTION], [QUESTION], **options)


def write_corpus(folder, texts):
    """A folder of documents with these texts and their splits."""
    rows = [
        {"id": document_id("files", text), "text": text, "text_hash": "", "source": "files", "split": split}
        for text, split in texts
    ]
    folder.mkdir(parents=True)
    write_documents(folder, [pa.Table.from_pylist(rows, schema=SCHEMA)])


def test_the_corpus_of_a_run_is_found_and_its_training_documents_are_read(tmp_path):
    run = tmp_path / "run"
    write_corpus(run / "corpus" / "documents", [(QUESTION, "train"), ("Held out.", "validation")])
    assert find_corpus(run) == find_corpus(run / "corpus") == find_corpus(run / "corpus" / "documents")
    assert [text for batch in corpus_texts(find_corpus(run)) for text in batch.to_pylist()] == [QUESTION]
    with pytest.raises(ArtefactError, match="no documents to look for contamination in"):
        find_corpus(tmp_path)


@pytest.mark.skipif(not EVALUATION.is_dir(), reason="the public evaluation sets are not on this machine")
def test_planted_questions_of_a_public_set_are_found_and_no_others():
    with (EVALUATION / "openbook_qa.jsonl").open(encoding="utf-8") as lines:
        questions = [json.loads(line) for line in lines]
    items = [
        TaskItem("openbook_qa", str(n), [f"{one['query']} {one['choices'][one['gold']]}"]) for n, one in enumerate(questions)
    ]
    planted = pa.array([item.texts[0] for item in items[:50]])
    overlaps = contamination(items, [planted])
    assert all(overlap.share == 1 for overlap in overlaps[:50] if overlap.ngrams)
    assert sum(overlap.dirty for overlap in overlaps[50:]) < 5
