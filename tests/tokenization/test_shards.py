import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ArtefactError
from bessemer.tokenization.shards import EncodedDocuments, ShardWriter, TokenShards, token_dtype

BOS = 99


def write(folder, lengths, *, batch=3, shard_tokens=10, vocab_size=100, seed=0):
    ids = np.random.default_rng(seed).integers(0, BOS, sum(lengths)).astype(np.uint32)
    writer = ShardWriter(folder, tokenizer_hash="hash", vocab_size=vocab_size, bos_id=BOS, shard_tokens=shard_tokens)
    ends = np.cumsum(lengths)
    for first in range(0, len(lengths), batch):
        chosen = lengths[first : first + batch]
        offsets = np.cumsum([0, *chosen], dtype=np.int64)
        start = int(ends[first]) - lengths[first]
        names = [str(index) for index in range(first, first + len(chosen))]
        text_bytes = np.array(chosen, np.int64) * 4
        writer.add(EncodedDocuments(names, ["source"] * len(chosen), text_bytes, ids[start : start + offsets[-1]], offsets))
    writer.finish()
    return ids


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=12),
    batch=st.integers(1, 5),
    shard_tokens=st.integers(1, 40),
)
def test_the_stream_is_begin_document_begin_document_begin(tmp_path_factory, lengths, batch, shard_tokens):
    folder = tmp_path_factory.mktemp("shards")
    ids = write(folder, lengths, batch=batch, shard_tokens=shard_tokens)
    shards = TokenShards(folder)
    expected, position = [], 0
    for length in lengths:
        expected += [BOS, *ids[position : position + length]]
        position += length
    assert shards.read(0, shards.tokens).tolist() == [*expected, BOS]
    assert (shards.tokens, shards.document_count, shards.bytes) == (len(expected) + 1, len(lengths), 4 * sum(lengths))

    files = [
        np.load(folder / shard["name"]) for shard in json.loads((folder / "shards.json").read_text(encoding="utf-8"))["shards"]
    ]
    position = 0
    for row, length in zip(shards.documents().to_pylist(), lengths, strict=True):  # the index finds each document
        found = files[row["shard"]][row["offset"] : row["offset"] + row["length"]]
        assert found.tolist() == [BOS, *ids[position : position + length]]
        position += length


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 200), length=st.integers(0, 200))
def test_reading_crosses_files_and_stops_at_the_end(tmp_path_factory, start, length):
    folder = tmp_path_factory.getbasetemp() / "read-across"
    if not folder.exists():
        write(folder, [7, 0, 30, 2, 11, 11, 40])
    shards = TokenShards(folder)
    whole = np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])
    assert len(list(folder.glob("*.npy"))) > 3
    found = shards.read(start, length)
    assert found.dtype == np.uint16
    assert found.tolist() == whole[start : start + length].tolist()


def test_batches_do_not_show_in_the_tokens(tmp_path):
    for batch in (1, 4):
        write(tmp_path / str(batch), [5, 9, 0, 14, 3, 8], batch=batch)
    assert TokenShards(tmp_path / "1").fingerprint == TokenShards(tmp_path / "4").fingerprint


def test_other_tokens_have_another_fingerprint(tmp_path):
    for seed in (0, 1):
        write(tmp_path / str(seed), [5, 9], seed=seed)
    assert TokenShards(tmp_path / "0").fingerprint != TokenShards(tmp_path / "1").fingerprint


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_take_two_bytes_up_to_a_vocabulary_of_65536(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    write(tmp_path, [4], vocab_size=vocab_size)
    assert TokenShards(tmp_path).read(0, 2).dtype == dtype


def test_a_split_without_documents_is_an_empty_stream(tmp_path):
    write(tmp_path, [])
    shards = TokenShards(tmp_path)
    assert (shards.tokens, shards.bytes, len(shards.read(0, 5))) == (0, 0, 0)


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    write(tmp_path, [4])
    TokenShards(tmp_path).check_tokenizer("hash", "the model")
    with pytest.raises(ArtefactError, match="made with another tokenizer than the model's"):
        TokenShards(tmp_path).check_tokenizer("other", "the model")


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    write(tmp_path, [400], shard_tokens=1000)
    path = tmp_path / "tokens-00000.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtefactError, match=r"tokens-00000\.npy: this token shard is missing or damaged"):
        TokenShards(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="no such index of token shards"):
        TokenShards(tmp_path / "nowhere")


def batches(lengths, skip=0, size=3):
    """The documents of `write`, but for the first `skip`, each of ids that follow from its number."""
    for first in range(skip, len(lengths), size):
        numbers = range(first, min(first + size, len(lengths)))
        ids = [np.random.default_rng(number).integers(0, BOS, lengths[number]).astype(np.uint32) for number in numbers]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        text_bytes = np.array([len(one) * 3 for one in ids], np.int64)
        yield EncodedDocuments([f"{n:03d}" for n in numbers], ["s"] * len(ids), text_bytes, np.concatenate(ids), offsets)


def resumable(folder, identity="work", shard_tokens=20, **changes):
    settings = {"tokenizer_hash": "hash", "vocab_size": 100, "bos_id": BOS, "shard_tokens": shard_tokens} | changes
    return ShardWriter(folder / "tokens", scratch=folder / "scratch", identity=identity, **settings)


def written(folder):
    return {path.name: path.read_bytes() for path in (folder / "tokens").iterdir()}


LENGTHS = [7, 0, 30, 2, 11, 5, 40, 3, 3, 19, 20, 1, 8]


@pytest.mark.parametrize("added", range(6))
def test_a_writer_that_goes_on_writes_the_same_bytes(tmp_path, added, monkeypatch):
    monkeypatch.setattr("bessemer.tokenization.shards._ROWS_PER_GROUP", 4)
    whole = resumable(tmp_path / "whole")
    for batch in batches(LENGTHS):
        whole.add(batch)
    whole.finish()
    interrupted = resumable(tmp_path / "cut")
    for _, batch in zip(range(added), batches(LENGTHS), strict=False):
        interrupted.add(batch)
    again = resumable(tmp_path / "cut")
    assert added < 2 or again.documents > 0
    for batch in batches(LENGTHS, skip=again.documents, size=2):
        again.add(batch)
    again.finish()
    assert written(tmp_path / "cut") == written(tmp_path / "whole")
    finished = resumable(tmp_path / "cut")  # killed after its end, before the stage's
    assert finished.documents == len(LENGTHS)
    finished.finish()
    assert written(tmp_path / "cut") == written(tmp_path / "whole")


@pytest.mark.parametrize(
    "change", [{"identity": "other"}, {"shard_tokens": 21}, {"tokenizer_hash": "x"}, {"vocab_size": 99}, None]
)
def test_what_other_work_or_damage_left_is_not_used(tmp_path, change):
    writer = resumable(tmp_path)
    for batch in batches(LENGTHS):
        writer.add(batch)
    if change is None:
        path = tmp_path / "tokens" / "tokens-00001.npy"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = resumable(tmp_path, **(change or {}))
    assert (again.documents, again.tokens) == (0, 0)
    assert written(tmp_path) == {}


def test_usage_counts_every_id_of_the_stream(tmp_path):
    ids = write(tmp_path, [5, 9, 0, 14], shard_tokens=6)
    usage = TokenShards(tmp_path).usage()
    assert usage.tolist() == np.bincount(np.append(ids, [BOS] * 5), minlength=100).tolist()


@pytest.mark.parametrize("documents", range(5))
def test_the_text_tokens_of_the_first_documents_are_counted_from_the_index(tmp_path, documents):
    write(tmp_path, [5, 9, 0, 14], shard_tokens=6)
    assert TokenShards(tmp_path).text_tokens(documents) == sum([5, 9, 0, 14][:documents])


def test_a_file_is_what_numpy_saves(tmp_path):
    write(tmp_path, [400, 3], shard_tokens=1000)
    path = tmp_path / "tokens-00000.npy"
    np.save(tmp_path / "saved.npy", np.load(path))
    assert path.read_bytes() == (tmp_path / "saved.npy").read_bytes()


def test_sources_are_named_once_and_in_order(tmp_path):
    writer = ShardWriter(tmp_path, tokenizer_hash="hash", vocab_size=100, bos_id=BOS, shard_tokens=10)
    for names in (["b", "a"], ["c", "a"]):
        documents = EncodedDocuments(["x", "y"], names, np.array([4, 4]), np.arange(2, dtype=np.uint32), np.array([0, 1, 2]))
        writer.add(documents)
    writer.finish()
    assert TokenShards(tmp_path).sources == ("a", "b", "c")
