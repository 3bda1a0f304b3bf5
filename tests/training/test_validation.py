import math

import numpy as np
import pytest
import torch

from bessemer.core.errors import ArtefactError
from bessemer.tokenization.shards import EncodedDocuments, ShardWriter, TokenShards
from bessemer.training.validation import bits_per_byte

VOCAB, BOS = 11, 10


class BigramModel:
    """The logits depend on the last token alone, so every window gives the same predictions but for none lost."""

    def __init__(self, table_VV: torch.Tensor) -> None:
        self.table_VV = table_VV
        self.head_weight, self.logit_softcap = torch.eye(VOCAB), None
        self.shapes: set[tuple[int, ...]] = set()

    def hidden(self, tokens_BT: torch.Tensor, *, positions_BT: torch.Tensor | None = None) -> torch.Tensor:
        self.shapes.add(tuple(tokens_BT.shape))
        return self.table_VV[tokens_BT]


def make_shards(folder, lengths=(5, 1, 17, 8), shard_tokens=12):
    ids = np.random.default_rng(1).integers(0, BOS, sum(lengths)).astype(np.uint32)
    writer = ShardWriter(folder, tokenizer_hash="t", vocab_size=VOCAB, bos_id=BOS, shard_tokens=shard_tokens)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    names = [f"{index:032x}" for index in range(len(lengths))]
    writer.add(EncodedDocuments(names, ["s"] * len(names), np.array(lengths, np.int64) * 3, ids, offsets))
    writer.finish()
    return TokenShards(folder)


def reference(table_VV, shards, targets):
    stream = torch.from_numpy(shards.read(0, targets + 1).astype(np.int64))
    return float(-table_VV.log_softmax(-1).double()[stream[:-1], stream[1:]].sum())


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "tokens")


def test_a_uniform_model_needs_log2_of_the_vocabulary_for_every_token_after_the_first(shards):
    score = bits_per_byte(BigramModel(torch.zeros(VOCAB, VOCAB)), shards, context_length=4, batch_size=2)
    assert score.tokens == shards.tokens - 1 == 5 + 1 + 17 + 8 + 4
    assert score.bytes == 3 * 31
    assert score.loss == pytest.approx(math.log(VOCAB))
    assert score.bits_per_byte == pytest.approx(score.tokens * math.log2(VOCAB) / score.bytes)


@pytest.mark.parametrize(("context_length", "batch_size"), [(1, 1), (4, 2), (7, 3), (64, 1), (35, 1), (3, 50)])
def test_every_token_is_counted_once_whatever_the_window_and_batch(shards, context_length, batch_size):
    table_VV = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
    model = BigramModel(table_VV)
    score = bits_per_byte(model, shards, context_length=context_length, batch_size=batch_size)
    assert score.loss * score.tokens == pytest.approx(reference(table_VV, shards, shards.tokens - 1), rel=1e-6)
    assert model.shapes == {(batch_size, context_length)}


@pytest.mark.parametrize(
    ("max_tokens", "tokens", "bytes_"), [(1, 6, 15), (6, 6, 15), (7, 6, 15), (8, 8, 18), (30, 26, 69), (99, 35, 93)]
)
def test_a_limit_keeps_whole_documents_with_their_end_and_at_least_one(shards, max_tokens, tokens, bytes_):
    table_VV = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
    score = bits_per_byte(BigramModel(table_VV), shards, context_length=4, batch_size=2, max_tokens=max_tokens)
    assert (score.tokens, score.bytes) == (tokens, bytes_)
    assert score.loss * tokens == pytest.approx(reference(table_VV, shards, tokens), rel=1e-6)


def test_an_empty_stream_is_refused_in_one_line(tmp_path):
    shards = make_shards(tmp_path / "empty", lengths=())
    with pytest.raises(ArtefactError, match="no text to measure"):
        bits_per_byte(BigramModel(torch.zeros(VOCAB, VOCAB)), shards, context_length=4, batch_size=2)
