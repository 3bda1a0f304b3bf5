import pytest
import torch

from bessemer.model.layers.delta_net import FORGET, delta_rule_chunked, delta_rule_stepwise, unit


def inputs(length, seed=0):
    draw = torch.Generator().manual_seed(seed)
    query, key = (unit(torch.randn(2, length, 3, 8, generator=draw)) for _ in range(2))
    value = torch.randn(2, length, 3, 5, generator=draw)
    strength = torch.rand(2, length, 3, generator=draw)
    log_fading = -torch.rand(2, length, 3, generator=draw) * 0.3
    state = torch.randn(2, 3, 8, 5, generator=draw)
    return query, key, value, strength, log_fading, state


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunks_give_what_the_rule_gives_step_by_step(length, with_state):
    *tokens, state = inputs(length)
    state = state if with_state else None
    outputs, end = delta_rule_chunked(*tokens, state)
    expected, expected_end = delta_rule_stepwise(*tokens, state)
    assert (outputs - expected).abs().max() < 1e-5
    assert (end - expected_end).abs().max() < 1e-5


def test_the_rule_by_hand_stores_a_value_under_its_key_and_replaces_it():
    key = torch.zeros(1, 2, 1, 2)
    key[..., 0] = 1
    value = torch.tensor([[[[3.0]], [[7.0]]]])
    full, none = torch.ones(1, 2, 1), torch.zeros(1, 2, 1)
    outputs, state = delta_rule_stepwise(key, key, value, full, none, None)
    assert outputs.flatten().tolist() == [3.0, 7.0]
    assert state.flatten().tolist() == [7.0, 0.0]


def test_after_forgetting_nothing_of_the_state_is_left():
    *tokens, state = inputs(70)
    query, key, value, strength, log_fading = tokens
    log_fading = log_fading.clone()
    log_fading[:, 30] = FORGET
    outputs, _ = delta_rule_chunked(query, key, value, strength, log_fading, state)
    fresh, _ = delta_rule_chunked(*(part[:, 30:] for part in tokens), None)
    assert (outputs[:, 30:] - fresh).abs().max() < 1e-5
