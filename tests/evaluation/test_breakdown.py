"""Bits per byte by source, domain and position, and by windows that overlap."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bessemer.core.progress import Silent
from bessemer.data.corpus.reader import SCHEMA
from bessemer.data.corpus.writer import write_documents
from bessemer.evaluation.bits_per_byte import POSITIONS, ScoredDocuments, breakdown, scored_documents, token_losses, token_nats
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.shards import EncodedDocuments, ShardWriter, TokenShards
from bessemer.tokenization.stage import tokenize
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.validation import bits_per_byte, whole_documents
from tests.inference.models import small_decoder
from tests.tokenization.conftest import synthetic_corpus, write_corpus

CONTEXT = 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    draw = np.random.default_rng(0)
    lengths = [30, 7, 61, 1, 20]
    ids = draw.integers(5, 200, sum(lengths)).astype(np.uint16)
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, tokenizer_hash="0", vocab_size=300, bos_id=0, shard_tokens=1 << 20)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    names = [str(number) for number in range(len(lengths))]
    writer.add(EncodedDocuments(names, ["a", "b", "a", "b", "b"], np.array(lengths) * 3, ids, offsets))
    writer.finish()
    return TokenShards(folder)


def nats_of(shards, **settings):
    model = small_decoder("dense")
    return token_nats(model, shards, whole_documents(shards, None), context_length=CONTEXT, **{"batch_size": 4, **settings})


def test_without_overlap_the_sum_is_that_of_trainings_own_measure(shards):
    nats = nats_of(shards)
    expected = bits_per_byte(small_decoder("dense"), shards, context_length=CONTEXT, batch_size=2)
    assert len(nats) == expected.tokens and nats.sum() / expected.tokens == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize("stride", [1, 7, 23])
def test_with_a_stride_each_token_is_predicted_from_the_window_that_ends_last_behind_it(shards, stride):
    nats, model = nats_of(shards, stride=stride), small_decoder("dense")
    stream = torch.from_numpy(shards.read(0, shards.tokens).astype(np.int64))
    for target in (0, 5, CONTEXT - 1, CONTEXT, 60, 100, len(nats) - 1):
        # windows end behind target number CONTEXT, CONTEXT + stride, …
        end = CONTEXT if target < CONTEXT else CONTEXT + (1 + (target - CONTEXT) // stride) * stride
        start = max(0, end - CONTEXT)
        with torch.no_grad():
            hidden = model.hidden(stream[None, start : target + 1])[0, -1:]
            logits = hidden @ model.head_weight.T
        assert nats[target] == pytest.approx(float(-logits.log_softmax(-1)[0, stream[target + 1]]), abs=1e-4)


def test_the_compiled_losses_are_those_of_the_full_logits():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(50, 16), torch.randn(300, 16) / 4, torch.randint(0, 300, (50,))
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    assert torch.allclose(token_losses(hidden, weight, targets), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(token_losses(hidden, weight, targets), expected, atol=0.05)


def scored(sources, domains):
    # two tokens and an end each, tokens of 2 bytes; the last document has 100 tokens
    ends = np.array([3, 6, 107])
    sizes = np.array([2, 2, 0, 2, 2, 0, *[2] * 100, 0])
    return ScoredDocuments(ends, np.array([4, 4, 200]), sources, domains, sizes)


def test_a_case_by_hand():
    bits = np.array([1, 2, 3, 4, 5, 6, *[8] * 101]) * math.log(2)
    found = breakdown(scored(["a", "b", "a"], ["", "x.org", "x.org"]), {"m": bits, "twice": 2 * bits})
    assert [(row["name"], row["documents"], row["bytes"]) for row in found["source"]] == [("a", 2, 204), ("b", 1, 4)]
    assert found["source"][1]["bits_per_byte"] == pytest.approx({"m": 15 / 4, "twice": 30 / 4})
    assert [row["name"] for row in found["domain"]] == ["x.org", ""]
    assert found["domain"][0]["bits_per_byte"]["m"] == pytest.approx((15 + 808) / 204)
    # 16 tokens of the long document and all of the short ones, then 48, then 36 and its end
    assert [(row["first"], row["bytes"]) for row in found["position"]] == [(0, 8 + 32), (16, 96), (64, 72)]
    assert [row["bits_per_byte"]["m"] for row in found["position"]] == pytest.approx([(21 + 128) / 40, 4, 37 * 8 / 72])


def test_the_parts_add_up_to_the_whole():
    nats = np.random.default_rng(1).random(107).astype(np.float32)
    for rows in breakdown(scored(["a", "b", "c"], ["x", "y", "z"]), {"m": nats}).values():
        assert sum(row["bits_per_byte"]["m"] * row["bytes"] for row in rows) == pytest.approx(nats.sum() / math.log(2))
        assert sum(row["bytes"] for row in rows) == 208


def test_what_nothing_is_known_of_is_left_out():
    documents = scored(["a"] * 3, [""] * 3)
    found = breakdown(ScoredDocuments(documents.ends_D, documents.bytes_D, documents.sources, documents.domains, None), {})
    assert list(found) == ["source"] and POSITIONS[0] == 0


def test_each_document_has_its_own_domain_and_its_tokens_their_bytes(tmp_path):
    write_corpus(tmp_path / "plain", synthetic_corpus(20))
    parts = [pq.read_table(path) for path in sorted((tmp_path / "plain").glob("part-*.parquet"))]
    table = pa.concat_tables(parts)
    urls = pa.array([f"https://x{id}.org:80/page" for id in table["id"].to_pylist()])
    table = table.set_column(table.schema.get_field_index("url"), "url", urls).cast(SCHEMA)
    write_documents(tmp_path / "documents", [table])
    tokenize(TokenizeConfig(vocab_size=300), tmp_path / "documents", tmp_path, seed=3, progress=Silent())
    shards, tokenizer = TokenShards(tmp_path / "tokens" / "validation"), load_tokenizer(tmp_path / "tokenizer")
    found = scored_documents(shards, tmp_path / "documents", 3, tokenizer)
    index = shards.documents().slice(0, 3)
    assert found.domains == [f"x{id}.org" for id in index["id"].to_pylist()] and len(found.domains) == 3
    assert found.bytes_N.sum() == found.bytes_D.sum() == sum(index["bytes"].to_pylist())
    assert not found.bytes_N[found.ends_D - 1].any(), "what ends a document stands for no text"
