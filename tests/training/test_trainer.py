import pytest
import torch

from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.objectives import next_token_loss
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer
from tests.cases import slow

from .conftest import TINY

ROWS, LENGTH = 8, 16


@pytest.fixture
def batch():
    """Eight rows of which the first hold many targets and the last few, and one none at all."""
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, 97, (ROWS, LENGTH), generator=generator)
    targets_BT = torch.randint(0, 97, (ROWS, LENGTH), generator=generator)
    for row in range(ROWS):
        targets_BT[row, : 2 * row] = IGNORE_INDEX
    targets_BT[3] = IGNORE_INDEX
    return Batch(tokens_BT, targets_BT)


def stepped(settings, batch, micro_batch_size, model=(), **changes):
    """The step object after the gradients of a batch in float64, with the loss."""
    config = settings.with_changes(**changes)
    shape = {name: value for name, value in TINY.items() if name != "preset"} | dict(model)
    model = initial_decoder(ModelConfig(**shape, vocab_size=97), seed=2).double().train()
    runtime = Runtime.of(config, torch.device("cpu"))
    options = {"gradient_clip": 1.0, "micro_batch_size": micro_batch_size}
    trainer = Trainer(model, build_optimizers(model, config), next_token_loss, runtime, **options)
    return trainer, trainer.gradients(batch).loss


@pytest.mark.parametrize("size", [slow(4), 3, slow(2), 1])
@pytest.mark.parametrize("model", [{}, {"num_nextn_predict_layers": 2}], ids=["", "multi-token prediction"])
def test_accumulated_gradients_are_those_of_the_whole_batch_with_masked_targets_too(settings, batch, size, model):
    whole, loss = stepped(settings, batch, None, model)
    pieces, summed = stepped(settings, batch, size, model)
    assert summed == pytest.approx(loss, rel=1e-12)
    for (name, expected), found in zip(whole.model.named_parameters(), pieces.model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-14, msg=name)


def test_the_loss_is_the_mean_over_targets_and_not_over_pieces(settings, batch):
    trainer, loss = stepped(settings, batch, 1)
    with torch.no_grad():
        assert loss == pytest.approx(float(next_token_loss(trainer.model, batch)), rel=1e-12)


def test_a_refused_step_moves_nothing_and_leaves_no_gradient(settings, batch):
    trainer, _ = stepped(settings, batch, None)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    result = trainer.step(batch, lambda loss, norm: False)
    assert not result.updated
    assert all(torch.equal(was, now) for was, now in zip(before, trainer.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_in_float16_an_overflow_halves_the_scale_and_the_step_after_moves(settings, batch):
    trainer, _ = stepped(settings, batch, None, dtype="float16")
    trainer.model.float().zero_grad()
    trainer.scale.load_state_dict({"scale": 2.0**40, "good": 0})
    results = [trainer.step(batch) for _ in range(30)]
    updated = [result.updated for result in results]
    assert updated[0] is False and updated[-1] is True
    assert trainer.scale.value == 2.0 ** (40 - updated.index(True))
    assert results[-1].gradient_norm < 10  # the scale is taken off


def test_float16_gradients_are_near_those_of_float32(settings, batch):
    half, _ = stepped(settings, batch, None, dtype="float16")
    half.model.float().zero_grad()
    full, _ = stepped(settings, batch, None)
    half.gradients(batch)
    for found, expected in zip(half.model.parameters(), full.model.parameters(), strict=True):
        difference = (found.grad / half.scale.value - expected.grad).norm() / expected.grad.norm()
        assert difference < 0.02
