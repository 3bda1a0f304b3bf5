"""New weights reach every shard of a model, and no key of the ones before is used again."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.execution import weights as sharded_weights
from tests.distributed.pool import pool_of
from tests.inference.models import small_tokenizer
from tests.inference.sharded import decoder, shared
from tests.model.randomised import random_decoder

PROMPTS = [[7, 8, 9], list(range(40, 73)), [*range(40, 72), 99]]
PARAMS = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=12, seed=5, ignore_eos=True)

two, four = pool_of(2, "module"), pool_of(4, "module")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("sharded"))


def other_weights(name, changes):
    return random_decoder(decoder(name, changes).config, seed=1)


def updated(engine, of):
    """Rollouts after an update, with the prefix cache warm before; and a stream in whose middle it came."""
    weights = other_weights(*of).state_dict()
    before = engine.rollouts(PROMPTS, 2, PARAMS)
    stream = engine.stream(PROMPTS[0], PARAMS)
    begun = [token for _ in range(4) for token in next(stream).token_ids]
    # several pieces of a tensor, some across the edge of a shard
    with patch.object(sharded_weights, "PIECE_BYTES", 5000):
        engine.update_weights(weights)
    rest = [token for chunk in stream for token in chunk.token_ids]
    return before, engine.rollouts(PROMPTS, 2, PARAMS), begun, rest


def compare(pool, tokenizer, name, parallel, changes):
    found = pool.run(shared, use=updated, of=(name, changes), name=name, parallel=parallel, changes=changes)
    before, after, begun, rest = found[0]
    other = Engine(other_weights(name, changes), tokenizer, config=EngineConfig(block_size=8))
    expected = other.rollouts(PROMPTS, 2, PARAMS)
    assert torch.equal(after.tokens, expected.tokens) and not torch.equal(after.tokens, before.tokens)
    torch.testing.assert_close(after.log_probs, expected.log_probs, atol=1e-4, rtol=0)
    assert after.weight_version[after.mask].unique().tolist() == [1]
    engine = Engine(decoder(name, changes), tokenizer, config=EngineConfig(block_size=8))
    stream = engine.stream(PROMPTS[0], PARAMS)
    assert [token for _ in range(4) for token in next(stream).token_ids] == begun
    engine.update_weights(other.model.state_dict())
    assert [token for chunk in stream for token in chunk.token_ids] == rest


@pytest.mark.parametrize(
    ("name", "parallel", "changes"),
    [
        ("dense", {"tensor": 2}, {"tie_word_embeddings": False}),
        ("experts", {"expert": 2}, {"router_correction_bias": True}),
        pytest.param("linear", {"tensor": 2}, {}, marks=pytest.mark.slow),
        pytest.param("latent", {"tensor": 2}, {}, marks=pytest.mark.slow),
        pytest.param("learned positions", {"tensor": 2}, {"mlp_bias": True}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_take_new_weights(two, tokenizer, name, parallel, changes):
    compare(two, tokenizer, name, parallel, changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parallel", "changes"),
    [
        ("experts", {"tensor": 2, "expert": 2}, {"num_experts": 8}),
        ("dense", {"tensor": 4}, {"num_key_value_heads": 4}),
    ],
)
def test_four_processes_take_new_weights(four, tokenizer, name, parallel, changes):
    compare(four, tokenizer, name, parallel, changes)
