from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa

from bessemer.data.corpus.reader import SCHEMA, iterate_documents
from bessemer.data.corpus.writer import write_documents
from bessemer.data.deduplication.corpus import Corpus
from bessemer.data.deduplication.decontaminate import Contamination, Item
from bessemer.data.deduplication.methods import exact_duplicates, summarise
from bessemer.data.deduplication.near import near_duplicates
from bessemer.data.deduplication.passages import repeated_lines, repeated_sentences
from bessemer.data.deduplication.removals import after, apply
from bessemer.data.text.texts import hash_text
from tests.data.deduplication.corpora import corpus_of, dropped

LINE = "one line of more than five words"


def rows_of(corpus) -> pa.RecordBatch:
    return pa.Table.from_batches(list(corpus.documents(["id", "text", "text_hash"]))).combine_chunks().to_batches()[0]


def test_each_method_sees_what_the_one_before_left(tmp_path):
    """The third loses its line and thereby equals the second; the copy of the first is gone before lines are looked at."""
    longer = f"{LINE}\nand a longer text behind it"
    texts = {1: longer, 2: "left alone", 3: f"{LINE}\nleft alone", 4: longer}
    first = corpus_of(texts)
    copies = exact_duplicates(first)
    second = after(first, copies)
    lines = repeated_lines(second, tmp_path, least_words_left=0)
    third = after(second, lines)
    copies_again = exact_duplicates(third)
    rows, reasons = apply([copies, lines, copies_again], rows_of(first))
    said = [reason and reason.replace("0" * 31, "") for reason in reasons.to_pylist()]
    assert said == [None, None, "duplicate of 2", "duplicate of 1"]
    assert rows.column("text").to_pylist() == [texts[1], "left alone", "left alone", texts[4]]
    assert rows.column("text_hash").to_pylist() == [hash_text(text) for text in rows.column("text").to_pylist()]
    assert [len(corpus) for corpus in (first, second, third, after(third, copies_again))] == [4, 3, 3, 2]


def test_two_methods_that_cut_share_a_scratch_folder(tmp_path):
    three = "One here. Two there. And three of them stand in a row."
    texts = [f"First.\n{LINE}\n{three} Last of all.", f"{LINE}\nThe end.", f"{three} Yes."]
    corpus = corpus_of(texts)
    lines = repeated_lines(corpus, tmp_path, least_words_left=0)
    sentences = repeated_sentences(after(corpus, lines), tmp_path, least_words_left=0)
    rows, _ = apply([lines, sentences], rows_of(corpus))
    assert rows.column("text").to_pylist() == [texts[0], "The end.", "Yes."]


def test_documents_of_the_earlier_corpus_count_through_the_whole_chain(tmp_path):
    corpus = corpus_of({1: "a b c", 2: "d e f", 3: "g h i"}, earlier={9: "a b c", 8: "g h i"})
    left = after(corpus, exact_duplicates(corpus))
    assert len(left) == 3
    assert left.first == 2
    assert [text for _, batch in left.batches() for text in batch.column("text").to_pylist()][2:] == ["d e f"]


def test_a_finding_that_reads_texts_drops_in_a_chain_too(tmp_path):
    question = "which of these gases in the air do plants take in through their leaves"
    corpus = corpus_of({1: question, 2: "something else", 3: "something else"})
    left = after(corpus, Contamination.of([Item("arc", "1", question)]))
    assert len(left) == 2
    assert len(after(left, exact_duplicates(left))) == 1


def test_texts_are_read_where_a_finding_needs_them_and_rows_without_changes_are_handed_on_as_they_are():
    corpus = corpus_of({1: "a b c d e f", 2: "something else", 3: "something else"})
    asked = set()
    spied = replace(corpus, documents=lambda columns: asked.update(columns) or corpus.documents(columns))
    list(after(spied, exact_duplicates(corpus)).documents(["text_hash"]))
    assert asked == {"id", "text_hash"}
    list(after(spied, Contamination.of([Item("arc", "1", "nothing of this is in the corpus")])).documents(["text_hash"]))
    assert asked == {"id", "text_hash", "text"}
    rows = rows_of(corpus)
    assert apply([exact_duplicates(corpus)], rows)[0] is rows


def test_the_first_reason_counts():
    question = "which of these gases in the air do plants take in through their leaves"
    corpus = corpus_of({1: question, 2: question})
    _, reasons = apply([exact_duplicates(corpus), Contamination.of([Item("arc", "1", question)])], rows_of(corpus))
    assert reasons.to_pylist() == ["overlap with arc, item 1", f"duplicate of {1:032x}"]


def test_rows_without_texts_are_enough_for_verdicts():
    texts = {1: "a", 2: "a"}
    corpus = corpus_of(texts)
    ids = pa.RecordBatch.from_pydict({"id": [f"{number:032x}" for number in texts]})
    rows, reasons = apply([exact_duplicates(corpus)], ids)
    assert rows.equals(ids)
    assert reasons.null_count == 1


def test_folders_of_documents_are_corpora(tmp_path):
    steel = "Steel is iron with carbon in it, and little else."
    texts = [steel, steel, steel.lower().replace(",", "")]
    rows = {
        "id": [f"{number:032x}" for number in range(3)],
        "text": texts,
        "text_hash": [hash_text(text) for text in texts],
        "source": ["steel"] * 3,
        "split": ["train"] * 3,
        **dict.fromkeys(["url", "language", "license", "metadata"], [None] * 3),
    }
    write_documents(tmp_path / "documents", [pa.table({name: rows[name] for name in SCHEMA.names}, schema=SCHEMA)])
    corpus = Corpus.of(partial(iterate_documents, tmp_path / "documents"))
    copies = exact_duplicates(corpus)
    left = after(corpus, copies)
    near = near_duplicates(left, tmp_path / "scratch").duplicates
    assert (len(copies), len(near)) == (1, 1)
    assert len(after(left, near)) == 1


def test_a_summary_tells_sizes_and_shows_the_largest_clusters(tmp_path):
    texts = dict(enumerate(["a " * 700] * 5 + ["b", "b", "c", "c", "c", "alone"]))
    corpus = corpus_of(texts)
    summary = summarise(corpus, exact_duplicates(corpus), examples=2)
    assert summary["clusters"] == 3
    assert summary["documents"] == 7
    assert summary["by_size"] == [
        {"from": 2, "to": 3, "clusters": 2, "documents": 5},
        {"from": 4, "to": 7, "clusters": 1, "documents": 5},
    ]
    largest, next_one = summary["largest"]
    assert (largest["id"], largest["size"], len(largest["text"]), len(largest["members"])) == (f"{0:032x}", 5, 600, 3)
    assert next_one["members"] == [{"id": f"{n:032x}", "text": "c"} for n in (8, 9)]
    near = near_duplicates(corpus, tmp_path).duplicates
    assert summarise(corpus, near)["largest"][0]["members"][0]["similarity"] == 1.0


def test_a_summary_of_nothing():
    corpus = corpus_of({1: "a"})
    assert summarise(corpus, exact_duplicates(corpus)) == {"clusters": 0, "documents": 0, "by_size": [], "largest": []}


def test_reasons_hold_for_any_part_of_the_rows():
    texts = dict.fromkeys(range(50), "same")
    duplicates = exact_duplicates(corpus_of(texts))
    order = np.random.default_rng(0).permutation(50)[:20].tolist()
    assert dropped(duplicates, dict.fromkeys(order, "same")) == {n: "duplicate of 0" for n in order if n}
