"""Cross-entropy by the compiled kernels beside float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.cpu_kernels.logits import cross_entropy_

pytestmark = pytest.mark.skipif(library() is None, reason=unavailable() or "")


def drawn(vocab_size, rows=37):
    """Logits, one of which leaves nothing to the others, and targets."""
    generator = torch.Generator().manual_seed(1)
    logits_NV = (torch.randn(rows, vocab_size, generator=generator) * 4).bfloat16()
    targets_N = torch.randint(0, vocab_size, (rows,), generator=generator)
    logits_NV[0, targets_N[0]] = 60
    return logits_NV, targets_N


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("vocab_size", [4096, 4093, 7])
def test_loss_and_gradient_equal_float64(vocab_size, z_loss):
    logits_NV, targets_N = drawn(vocab_size)
    wide_NV = logits_NV.double().requires_grad_()
    log_sums_N = wide_NV.logsumexp(-1)
    log_probs_N = wide_NV.gather(1, targets_N[:, None])[:, 0] - log_sums_N
    (z_loss * log_sums_N.square() - log_probs_N).sum().backward()
    found_N, log_odds_N = cross_entropy_(logits_NV, targets_N, z_loss=z_loss)
    assert torch.allclose(found_N.double(), log_sums_N, rtol=1e-6, atol=1e-6)
    assert torch.allclose(logsigmoid(log_odds_N.double()), log_probs_N, rtol=1e-5, atol=1e-7)
    # what is left is rounding to bfloat16, and float64 has no 1 - p near p = 1
    assert torch.allclose(logits_NV.double(), wide_NV.grad, rtol=2**-8, atol=1e-12)


def test_without_a_gradient_the_logits_stay():
    logits_NV, targets_N = drawn(96)
    before_NV = logits_NV.clone()
    found = cross_entropy_(logits_NV, targets_N, wants_gradient=False)
    assert torch.equal(logits_NV, before_NV)
    assert all(map(torch.equal, found, cross_entropy_(before_NV, targets_N)))


def test_threads_and_rows_beside_it_change_no_bit_of_a_row():
    logits_NV, targets_N = drawn(96)
    alone_NV, together_NV = logits_NV.clone(), logits_NV.clone()
    found = [cross_entropy_(alone_NV[row : row + 1], targets_N[row : row + 1], threads=1) for row in range(len(alone_NV))]
    expected = cross_entropy_(together_NV, targets_N, threads=3)
    assert torch.equal(alone_NV, together_NV)
    assert all(torch.equal(torch.cat(parts), whole) for parts, whole in zip(zip(*found, strict=True), expected, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_row_alone(value):
    logits_NV, targets_N = drawn(100, rows=3)
    logits_NV[1, 98] = value
    log_sums_N, log_odds_N = cross_entropy_(logits_NV, targets_N)
    assert (log_sums_N + log_odds_N).isfinite().tolist() == [True, False, True]
    assert logits_NV.isfinite().all(-1).tolist() == [True, False, True]


def test_a_target_outside_the_vocabulary_is_refused():
    logits_NV, targets_N = drawn(16)
    with pytest.raises(ValueError, match="target 16 is none of 16"):
        cross_entropy_(logits_NV, targets_N.clone().fill_(16))
