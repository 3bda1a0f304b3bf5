from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training import objectives
from bessemer.training.config import PretrainConfig
from bessemer.training.data.batches import IGNORE_INDEX, Batch
from bessemer.training.objectives import (
    build_objective,
    linear_cross_entropy,
    mean_by_source,
    next_token_loss,
    sums_by_source,
    token_losses,
)
from bessemer.training.validation import summed_loss


def made(count, width, vocab_size, dtype=torch.float64, seed=0, ignored=0.3):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=draw, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocab_size, (count,), generator=draw)
    targets[torch.rand(count, generator=draw) < ignored] = IGNORE_INDEX
    return hidden, weight, targets


def full_logits_loss(hidden, weight, targets, softcap=None, z_loss=0.0):
    """The definition, with every logit in memory."""
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_sums = logits[targets != IGNORE_INDEX].logsumexp(-1)
    return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX) + z_loss * log_sums.square().mean()


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(2, 50),
    st.integers(1, 300),
    st.integers(0, 1000),
    st.sampled_from([None, 1.5]),
    st.sampled_from([0.0, 0.1]),
)
def test_it_equals_torch_in_value_and_gradient(count, width, vocab_size, chunk_elements, seed, softcap, z_loss):
    hidden, weight, targets = made(count, width, vocab_size, seed=seed)
    targets[0] = 0
    before, objectives._CHUNK_ELEMENTS = objectives._CHUNK_ELEMENTS, chunk_elements
    try:
        ours = linear_cross_entropy(hidden, weight, targets, softcap, z_loss)
        gradients = torch.autograd.grad(3 * ours, (hidden, weight))
    finally:
        objectives._CHUNK_ELEMENTS = before
    theirs = full_logits_loss(hidden, weight, targets, softcap, z_loss)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * theirs, (hidden, weight)))


def test_large_logits_neither_overflow_nor_vanish():
    hidden, weight, targets = made(6, 4, 10, torch.float32, ignored=0)
    ours = linear_cross_entropy(hidden * 1e3, weight, targets)
    torch.testing.assert_close(ours, cross_entropy(hidden * 1e3 @ weight.T, targets))


def test_without_a_target_it_is_zero_with_zero_gradients():
    hidden, weight, targets = made(5, 4, 10, ignored=1)
    value = linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(value, (hidden, weight))
    assert value.item() == 0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


def test_under_autocast_it_stays_near_float32_and_sums_in_it():
    hidden, weight, targets = made(64, 16, 50, torch.float32)
    exact = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, targets)
    gradients = [torch.autograd.grad(value, weight)[0] for value in (exact, rounded)]
    assert rounded.dtype == torch.float32 and gradients[1].dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0)
    assert torch.linalg.norm(gradients[1] - gradients[0]) < 0.02 * torch.linalg.norm(gradients[0])


class Largest(TorchDispatchMode):
    """Remembers the most elements that a result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_the_logits_of_a_whole_batch_are_never_there(monkeypatch):
    monkeypatch.setattr(objectives, "_CHUNK_ELEMENTS", 4096)
    hidden, weight, targets = made(512, 8, 128)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert largest.elements == 4096 < 512 * 128


def test_the_loss_of_a_model_is_that_of_its_logits(decoder):
    tokens = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    expected = cross_entropy(decoder(batch.tokens_BT).flatten(0, 1), batch.targets_BT.flatten())
    torch.testing.assert_close(next_token_loss(decoder, batch), expected)


def test_a_z_loss_is_asked_for_in_the_settings_and_no_part_of_validation(decoder):
    tokens = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    plain, with_z = (build_objective(PretrainConfig(steps=1, z_loss=z_loss))(decoder, batch) for z_loss in (0.0, 0.5))
    log_sums = decoder(batch.tokens_BT).logsumexp(-1)
    torch.testing.assert_close(with_z - plain, 0.5 * log_sums.square().mean())
    with torch.no_grad():
        assert summed_loss(decoder, batch.tokens_BT, batch.targets_BT) / 32 == pytest.approx(plain.item())


def test_a_z_loss_beside_a_loss_of_your_own_is_refused():
    with pytest.raises(ConfigError, match="add it there"):
        PretrainConfig.parse({"steps": 1, "z_loss": 1e-4, "loss": "mine.py:loss"}, "pretrain")


def test_validation_caps_logits_as_the_model_does():
    model = initial_decoder(ModelConfig(vocab_size=50, final_logit_softcapping=0.1, initializer_range=0.5), seed=1)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    with torch.no_grad():
        assert summed_loss(model, tokens[:, :-1], tokens[:, 1:]) == pytest.approx(expected.item())


@pytest.fixture
def sourced():
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 97, (4, 17), generator=draw)
    targets = tokens[:, 1:].masked_fill(torch.rand(4, 16, generator=draw) < 0.3, IGNORE_INDEX)
    sources = torch.randint(0, 2, (4, 16), generator=draw, dtype=torch.int16)
    return Batch(tokens[:, :-1], targets, sources_BT=sources, source_names=("code", "web", "nothing"))


def test_means_weighed_by_their_tokens_are_the_loss(decoder, sourced):
    decoder.eval()
    sums, counts = sums_by_source(token_losses(decoder, sourced), sourced)
    assert counts.tolist()[2] == 0 and int(counts.sum()) == int((sourced.targets_BT != IGNORE_INDEX).sum())
    torch.testing.assert_close(sums.sum() / counts.sum(), next_token_loss(decoder, sourced).double(), rtol=1e-5, atol=0)
    assert set(mean_by_source(sums, counts, sourced.source_names)) == {"code", "web"}


def test_each_source_has_the_loss_of_its_own_targets(decoder, sourced):
    decoder.eval()
    means = mean_by_source(*sums_by_source(token_losses(decoder, sourced), sourced), sourced.source_names)
    for number, name in enumerate(("code", "web")):
        alone = replace(
            sourced,
            targets_BT=sourced.targets_BT.masked_fill(sourced.sources_BT != number, IGNORE_INDEX),
        )
        assert means[name] == pytest.approx(next_token_loss(decoder, alone).item(), rel=1e-5)


def test_sums_of_parts_add_up(sourced):
    losses = torch.rand(4, 16, dtype=torch.float64)
    whole = sums_by_source(losses, sourced)
    parts = [sums_by_source(losses[rows], sourced.rows(rows)) for rows in (slice(0, 1), slice(1, 4))]
    for number in range(2):
        torch.testing.assert_close(parts[0][number] + parts[1][number], whole[number])


def test_a_batch_without_targets_has_no_losses(sourced):
    silent = replace(sourced, targets_BT=torch.full_like(sourced.targets_BT, IGNORE_INDEX))
    assert mean_by_source(*sums_by_source(torch.zeros(4, 16), silent), silent.source_names) == {}
