import itertools

import numpy as np
import pytest
import torch

from bessemer.core.errors import ArtefactError
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batch import Batch
from bessemer.training.data.batches import TokenBatches, rows_of_step


@pytest.fixture(scope="module")
def shards(tokenized):
    return TokenShards(tokenized / "tokens" / "train")


def test_a_target_is_the_token_that_follows(shards):
    batch = TokenBatches(shards, batch_size=3, context_length=16, seed=1).batch(4)
    assert batch.tokens_BT.shape == batch.targets_BT.shape == (3, 16)
    assert torch.equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])
    stream = shards.read(0, shards.tokens).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(stream, 17)
    for tokens, targets in zip(batch.tokens_BT, batch.targets_BT, strict=True):
        assert (windows == np.append(tokens, targets[-1])).all(axis=1).any()


def test_every_window_is_read_once_an_epoch(shards):
    batches = TokenBatches(shards, batch_size=1, context_length=64, seed=5)
    seen = [tuple(batches.batch(step).tokens_BT[0].tolist()) for step in range(batches.rows)]
    stream = shards.read(0, batches.rows * 64).astype(np.int64).reshape(-1, 64)
    assert sorted(seen) == sorted(map(tuple, stream.tolist()))


def test_epochs_have_orders_of_their_own():
    first, second = (np.concatenate([rows_of_step(step, 1, 40, seed=3) for step in range(a, a + 40)]) for a in (0, 40))
    assert sorted(first) == sorted(second) == list(range(40))
    assert not np.array_equal(first, second)


def test_the_order_does_not_depend_on_how_rows_are_shared_out():
    together = [rows_of_step(step, 8, 37, seed=3) for step in range(20)]
    halves = [rows_of_step(step, 4, 37, seed=3) for step in range(40)]
    assert np.array_equal(np.concatenate(together), np.concatenate(halves))


def test_a_batch_depends_on_its_step_alone(shards):
    one, other = (TokenBatches(shards, batch_size=2, context_length=16, seed=1) for _ in range(2))
    for step in range(5):
        one.batch(step)
    assert torch.equal(one.batch(3).tokens_BT, other.batch(3).tokens_BT)


@pytest.mark.parametrize("cuts", [[0, 6], [0, 2, 4, 6], [0, 1, 6]])
def test_parts_of_a_batch_in_a_row_are_the_batch(shards, cuts, monkeypatch):
    batches = TokenBatches(shards, batch_size=6, context_length=16, seed=1)
    whole = batches.batch(3)
    read, reads = TokenShards.read, []
    monkeypatch.setattr(TokenShards, "read", lambda self, *place: reads.append(place) or read(self, *place))
    parts = [batches.batch(3, slice(*ends)) for ends in itertools.pairwise(cuts)]
    assert len(reads) == batches.batch_size == 6, "a row was read twice"
    assert torch.equal(torch.cat([part.tokens_BT for part in parts]), whole.tokens_BT)
    assert torch.equal(torch.cat([part.targets_BT for part in parts]), whole.targets_BT)


def test_the_fingerprint_tells_orders_apart(shards):
    prints = {
        TokenBatches(shards, batch_size=size, context_length=16, seed=seed).fingerprint for size in (2, 3) for seed in (1, 2)
    }
    assert len(prints) == 4


def test_a_stream_shorter_than_a_row_is_refused(shards):
    with pytest.raises(ArtefactError, match="fewer than one row"):
        TokenBatches(shards, batch_size=1, context_length=10**6, seed=1)


@pytest.fixture
def packed():
    """Two rows of three sequences and of one, the rest of it padding, with values of tokens and of sequences."""
    documents_BT = torch.tensor([[1, 1, 2, 2, 2, 3], [1, 1, 1, 0, 0, 0]])
    tokens_BT = torch.arange(12).view(2, 6)
    values_BS = torch.tensor([[10.0, 20.0, 30.0], [40.0, -1.0, -1.0]])
    values = {"per_token": {"place": tokens_BT.double()}, "per_sequence": {"reward": values_BS}}
    return Batch(tokens_BT, tokens_BT, None, documents_BT, sequences=3).with_values(**values)


def test_values_of_tokens_add_up_by_sequence_without_padding(packed):
    sums_BS = packed.sequence_sums(packed.per_token["place"])
    assert sums_BS.tolist() == [[0 + 1, 2 + 3 + 4, 5], [6 + 7 + 8, 0, 0]]
    row = Batch(packed.tokens_BT, packed.targets_BT)
    assert row.sequence_sums(packed.per_token["place"]).tolist() == [[15], [51]]


def test_a_token_finds_the_value_of_its_sequence(packed):
    found_BT = packed.of_tokens(packed.per_sequence["reward"])
    assert found_BT[0].tolist() == [10, 10, 20, 20, 20, 30]
    assert found_BT[1, :3].tolist() == [40, 40, 40]


def test_rows_take_their_values_along_and_columns_those_of_their_tokens(packed):
    row = packed.rows(slice(1, 2))
    assert row.per_sequence["reward"].tolist() == [[40, -1, -1]] and row.per_token["place"].tolist() == [[6, 7, 8, 9, 10, 11]]
    ends = packed.columns([slice(0, 1), slice(5, 6)])
    assert ends.per_token["place"].tolist() == [[0, 5], [6, 11]]
    assert torch.equal(ends.per_sequence["reward"], packed.per_sequence["reward"])
    parts = [packed.columns([slice(0, 3)]), packed.columns([slice(3, 6)])]
    whole_BS = packed.sequence_sums(packed.per_token["place"])
    assert torch.equal(sum(part.sequence_sums(part.per_token["place"]) for part in parts), whole_BS)


def test_sums_of_sequences_pass_gradients_to_their_tokens(packed):
    values_BT = torch.ones(2, 6, requires_grad=True)
    (packed.sequence_sums(values_BT) * packed.per_sequence["reward"]).sum().backward()
    assert values_BT.grad.tolist() == [[10, 10, 20, 20, 20, 30], [40, 40, 40, 0, 0, 0]]
