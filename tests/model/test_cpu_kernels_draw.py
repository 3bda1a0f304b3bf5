"""Tokens drawn by the compiled kernels beside float64."""

from __future__ import annotations

import pytest
import torch

from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.cpu_kernels.logits import draw_tokens

pytestmark = pytest.mark.skipif(library() is None, reason=unavailable() or "")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab_size", [4096, 1001, 7])
def test_tokens_and_log_probabilities_equal_float64(vocab_size, temperature):
    generator = torch.Generator().manual_seed(1)
    logits_RV = torch.randn(64, vocab_size, generator=generator) * 3
    logits_RV[:, 3] = -torch.inf
    uniforms_R = torch.rand(64, generator=generator, dtype=torch.float64)
    tokens, log_probs = draw_tokens(logits_RV, [temperature] * 64, uniforms_R.tolist())
    wide_RV = (logits_RV.double() / temperature).log_softmax(-1)
    cumulative_RV = wide_RV.exp().cumsum(-1)
    # but for numbers within rounding of the edge between two tokens
    is_clear_R = (cumulative_RV - uniforms_R[:, None]).abs().amin(-1) > 1e-6
    expected_R = torch.searchsorted(cumulative_RV, uniforms_R[:, None], right=True)[:, 0]
    assert is_clear_R.sum() > 50
    assert torch.equal(torch.tensor(tokens)[is_clear_R], expected_R[is_clear_R])
    of_tokens_R = wide_RV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(log_probs).double(), of_tokens_R, atol=2e-6)


def test_no_token_of_probability_0_is_drawn():
    logits_RV = torch.full((3, 600), -torch.inf)
    logits_RV[:, 299] = 5.0
    logits_RV[:, 300] = 5.0
    assert draw_tokens(logits_RV, [1.0] * 3, [0.0, 0.499, 1 - 2**-53])[0] == [299, 299, 300]


def test_at_temperature_0_the_first_of_the_largest_is_certain():
    assert draw_tokens(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), [0.0], [0.9]) == ([1], [0.0])


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_has_no_token(value, temperature):
    logits_RV = torch.zeros(4, 19)
    logits_RV[1, 17] = value
    logits_RV[2] = -torch.inf
    tokens, _ = draw_tokens(logits_RV, [temperature] * 4, [0.5] * 4)
    assert [token >= 0 for token in tokens] == [True, False, False, True]


def test_threads_and_rows_beside_it_change_no_bit_of_a_row():
    logits_RV = torch.randn(37, 333, generator=torch.Generator().manual_seed(2))
    uniforms = torch.rand(37, generator=torch.Generator().manual_seed(3)).tolist()
    together = draw_tokens(logits_RV, [0.9] * 37, uniforms, threads=3)
    alone = [draw_tokens(logits_RV[row : row + 1], [0.9], uniforms[row : row + 1], threads=1) for row in range(37)]
    assert together == ([tokens[0] for tokens, _ in alone], [log_probs[0] for _, log_probs in alone])
