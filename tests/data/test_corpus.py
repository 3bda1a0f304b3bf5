from __future__ import annotations

import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_files
from bessemer.data.corpus.reader import (
    SCHEMA,
    bucket_of,
    count_documents,
    document_id,
    document_schema,
    iterate_documents,
)
from bessemer.data.corpus.writer import DocumentWriter, write_documents
from bessemer.data.text.texts import hash_text, hash_texts


def rows(numbers, split="train", schema=SCHEMA):
    return pa.Table.from_pylist(
        [
            {
                "id": document_id("test", str(number)),
                "text": f"text {number}",
                "text_hash": hash_text(f"text {number}"),
                "source": "test",
                "split": split,
                "metadata": [("number", str(number))],
            }
            for number in numbers
        ],
        schema=schema,
    )


def bytes_of(folder):
    return hash_files(folder, folder.rglob("*"))


def test_an_id_is_fixed_for_good():
    assert document_id("wheels", "sympy/sympy/core/add.py#Add") == "931d968ccb6aa2c92e4786c4dcba51e0"


def test_a_document_lies_in_the_part_that_its_id_as_a_number_gives(tmp_path):
    write_documents(tmp_path, [rows(range(100))])
    for part in range(16):
        ids = pq.read_table(tmp_path / f"part-{part:02d}.parquet").column("id").to_pylist()
        assert ids == sorted(ids)
        assert all(int(identity, 16) % 16 == part for identity in ids)
    assert bucket_of(pa.array([document_id("a", "b")]), 4)[0] == int(document_id("a", "b"), 16) % 4


@pytest.fixture(scope="module")
def bytes_at_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    write_documents(folder, [rows(range(60))], buckets=8)
    return bytes_of(folder)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(60)), st.lists(st.integers(1, 59), max_size=6))
def test_the_bytes_do_not_depend_on_order_or_batches(tmp_path_factory, bytes_at_once, order, cuts):
    found = tmp_path_factory.mktemp("many")
    edges = [0, *sorted(set(cuts)), 60]
    write_documents(found, [rows(order[start:end]) for start, end in itertools.pairwise(edges)], buckets=8)
    assert bytes_of(found) == bytes_at_once


def test_the_bytes_do_not_depend_on_batches_across_row_groups(tmp_path):
    everything = rows(range(20_000))
    write_documents(tmp_path / "one", [everything], buckets=1)
    write_documents(tmp_path / "many", [everything.slice(start, 777) for start in range(0, 20_000, 777)], buckets=1)
    assert bytes_of(tmp_path / "many") == bytes_of(tmp_path / "one")
    assert pq.read_metadata(tmp_path / "one" / "part-00.parquet").num_row_groups == 5


def test_of_rows_with_one_id_the_first_by_hash_stays(tmp_path):
    same = document_id("test", "same")
    table = rows(range(4))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        repeated = table.set_column(0, SCHEMA.field("id"), pa.array([same] * 4)).take(pa.array(order))
        written = write_documents(tmp_path, [repeated])
        assert (written.documents, written.repeated_ids) == (1, 3)
        kept = next(iterate_documents(tmp_path)).to_pylist()[0]
        assert kept["text_hash"] == min(table.column("text_hash").to_pylist())


def test_text_hash_ignores_white_space_and_composition_alone():
    assert hash_text(" caf\u00e9\n\n au  lait") == hash_text("cafe\u0301 au lait ")
    assert hash_text("Steel") != hash_text("steel")


@settings(deadline=None)
@given(st.lists(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \t\n\x1c\x85\u00a0\u2003\u3000e\u0301")))))
@example(["", "  ", " a  b ", "cafe\u0301 ", "caf\u00e9\u2028au\u3000lait", "\u2000x", "x\x7f\x80"])
def test_a_batch_s_text_hashes_are_those_of_its_texts(texts):
    assert hash_texts(pa.array(texts, pa.string())) == [hash_text(text) for text in texts]


def test_a_reader_gives_one_split_and_only_the_columns_asked_for(tmp_path):
    write_documents(tmp_path, [rows(range(30)), rows(range(30, 40), split="validation")])
    batches = list(iterate_documents(tmp_path, ["text"], "validation"))
    assert sorted(text for batch in batches for text in batch.column("text").to_pylist()) == [
        f"text {n}" for n in range(30, 40)
    ]
    assert {tuple(batch.schema.names) for batch in batches} == {("text",)}
    assert (count_documents(tmp_path), count_documents(tmp_path, "validation")) == (40, 10)


def test_a_reader_never_gives_more_rows_than_asked_for(tmp_path):
    write_documents(tmp_path, [rows(range(500))], buckets=1)
    assert [batch.num_rows for batch in iterate_documents(tmp_path, batch_rows=200)] == [200, 200, 100]


def test_score_columns_follow_the_fixed_ones(tmp_path):
    schema = SCHEMA.append(pa.field("score", pa.float64()))
    write_documents(tmp_path, [rows([1]).append_column("score", pa.array([0.5]))], schema)
    assert document_schema(tmp_path) == schema


def test_a_folder_without_parts_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="not a folder of documents"):
        next(iterate_documents(tmp_path))


def test_parts_of_another_format_are_refused(tmp_path):
    pq.write_table(rows([1]), tmp_path / "part-00.parquet")
    with pytest.raises(ArtefactError, match="reads documents of format 1"):
        count_documents(tmp_path)


def test_a_damaged_part_is_refused(tmp_path):
    (tmp_path / "part-00.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ArtefactError, match="damaged"):
        count_documents(tmp_path)


def test_scratch_of_a_killed_writer_does_not_reach_the_next(tmp_path):
    DocumentWriter(tmp_path).write(rows([1, 2, 3]))
    write_documents(tmp_path, [rows([4])])
    assert count_documents(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("part-")] == []


def test_other_tools_read_the_folder(tmp_path):
    write_documents(tmp_path, [rows(range(10))])
    table = pq.read_table(tmp_path)
    assert table.num_rows == 10
    assert table.column("metadata").to_pylist()[0][0][0] == "number"


@pytest.mark.parametrize("skip", [0, 1, 7, 25, 59, 60])
def test_skipping_leaves_out_the_first_documents_of_a_split(tmp_path, skip):
    write_documents(tmp_path, [rows(range(60)), rows(range(60, 100), "validation")])

    def ids(skip):
        return [
            id
            for batch in iterate_documents(tmp_path, ["id"], "train", batch_rows=3, skip=skip)
            for id in batch["id"].to_pylist()
        ]

    assert ids(skip) == ids(0)[skip:]
