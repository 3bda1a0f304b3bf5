"""One step of training on a card: loss, gradients and moves of the processor, in every type and by every optimizer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from bessemer.model.initialisation import initial_decoder
from bessemer.training.head import head_divergence, linear_cross_entropy, token_log_probs
from bessemer.training.model_setup import recompute_activations
from bessemer.training.objectives import build_objective
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.optim.registry import OPTIMIZERS
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer
from tests.distributed.parity import RandomBatches
from tests.gpu.comparison import KINDS, relative_difference
from tests.inference.models import ARCHITECTURES, BASE, small_decoder
from tests.training.test_head import DIVERGENCES, made, made_pair, weighed

pytestmark = pytest.mark.gpu

SETTINGS = {
    "steps": 4,
    "batch_size": 4,
    "context_length": 32,
    "dtype": "float32",
    "compile": False,
    "threads": 1,
    "optimizer": "adamw",
    "learning_rate": 0.01,
}


def new_decoder(name):
    """A decoder as it is before training, whose gradients are not as large as those of `small_decoder`."""
    return initial_decoder(BASE.with_changes(**ARCHITECTURES[name]), seed=2)


def step_of(device, name="dense", make=new_decoder, **changes):
    """The step of a decoder on a device, and the batches that it reads."""
    config = PretrainConfig(**SETTINGS | changes)
    model = make(name).to(device).train()
    runtime = Runtime.of(config, torch.device(device))
    optimizers = build_optimizers(model, config)
    trainer = Trainer(
        model,
        optimizers,
        build_objective(config, model.config),
        runtime,
        gradient_clip=1.0,
        micro_batch_size=config.micro_batch_size,
    )
    return trainer, RandomBatches(config.batch_size, config.context_length, model.config.vocab_size, packed=True)


def gradients_of(trainer, batches):
    """The loss of the first batch, and its gradients by name, with the loss's scale taken off."""
    loss = trainer.gradients(batches.batch(0)).loss
    return loss, {name: parameter.grad / trainer.scale.value for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("micro_batch_size", [None, 1])
@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_those_of_the_processor(name, micro_batch_size, device):
    loss, found = gradients_of(*step_of(device, name, small_decoder, micro_batch_size=micro_batch_size))
    expected_loss, expected = gradients_of(*step_of("cpu", name, small_decoder))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    # on the processor, float32 is as far from float64 as this: 1e-4 with linear attention, 2e-6 without
    tolerance = 1e-3 if name == "linear" else 1e-4
    for place, gradient in expected.items():
        assert found[place].device.type == device.type
        assert relative_difference(found[place], gradient) < tolerance, place


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.02)])
@pytest.mark.parametrize("name", ["dense", "windows", "experts", "sinks and caps", "alibi", "latent", "linear"])
def test_masked_blocks_left_out_give_the_step_of_a_dense_mask(name, dtype, tolerance, compiled, device):
    """Rows of several documents: the loss, and all gradients together."""
    wide = {"head_dim": 16} | ({"qk_nope_head_dim": 16, "v_head_dim": 16} if name == "latent" else {})
    results = []
    for backend in ("flex", "sdpa"):

        def make(name):
            return initial_decoder(BASE.with_changes(**ARCHITECTURES[name] | wide), seed=2)

        trainer, batches = step_of(device, name, make, dtype=dtype, compile=compiled, context_length=150)
        if backend == "flex":
            trainer.runtime.skip_masked_blocks(trainer.model)
        assert trainer.model.attention_backend == backend
        trainer.runtime.compile_blocks(trainer.model, alone=True)
        results.append(gradients_of(trainer, batches))
    (loss, found), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    both = [torch.cat([gradient.flatten() for gradient in gradients.values()]) for gradients in (found, expected)]
    assert relative_difference(*both) < tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", KINDS)
def test_narrow_products_give_nearly_the_loss_and_gradients_of_float32(name, dtype, device):
    narrow_loss, narrow = gradients_of(*step_of(device, name, dtype=dtype))
    loss, expected = gradients_of(*step_of(device, name))
    assert 0 < abs(narrow_loss - loss) < 1e-3 * loss
    both = [torch.cat([gradient.flatten() for gradient in gradients.values()]) for gradients in (narrow, expected)]
    assert 1e-4 < relative_difference(*both) < 0.02


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_gradients_and_states_stay_float32(dtype, device):
    trainer, batches = step_of(device, dtype=dtype)
    seen = []

    def look(loss, norm):
        seen.extend(parameter.grad.dtype for parameter in trainer.model.parameters())
        return True

    results = [trainer.step(batches.batch(number), look) for number in range(4)]
    assert results[-1].updated
    seen += [parameter.dtype for parameter in trainer.model.parameters()]
    seen += [value.dtype for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values()]
    assert set(seen) == {torch.float32}


def test_in_float16_an_overflow_halves_the_scale_and_a_later_step_moves(device):
    trainer, batches = step_of(device, dtype="float16")
    trainer.scale.load_state_dict({"scale": 2.0**40, "good": 0})
    results = [trainer.step(batches.batch(0)) for _ in range(30)]
    updated = [result.updated for result in results]
    assert not updated[0] and updated[-1]
    assert trainer.scale.value == 2.0 ** (40 - updated.count(False))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_processor_waits_for_the_card_once_a_step(optimizer, device):
    trainer, _ = step_of(device, optimizer=optimizer, micro_batch_size=2)
    batch = RandomBatches(4, 32, trainer.model.config.vocab_size).batch(0).pinned()
    # the first step makes the optimizer's states
    trainer.step(batch)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([str(one.message) for one in found if "synchronizing" in str(one.message)]) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_moves_as_on_the_processor(optimizer, device):
    start = new_decoder("dense").state_dict()
    steps = [step_of(where, optimizer=optimizer) for where in (device, "cpu")]
    for trainer, batches in steps:
        for number in range(3):
            assert trainer.step(batches.batch(number)).updated
    (found, _), (expected, _) = steps
    # where a gradient is next to nothing, its sign is a matter of rounding; Muon's products are in bfloat16
    for name, weight in expected.model.state_dict().items():
        assert relative_difference(found.model.state_dict()[name], weight, start[name]) < 0.05, name


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("name", ["dense", "experts"])
def test_recomputed_gradients_are_the_same(name, kind, device):
    trainer, batches = step_of(device, name)
    plain = copy.deepcopy(trainer.model)
    recompute_activations(trainer.model, kind)
    _, found = gradients_of(trainer, batches)
    trainer.model = plain
    _, expected = gradients_of(trainer, batches)
    assert all(relative_difference(found[place], gradient) < 1e-5 for place, gradient in expected.items())


@pytest.mark.parametrize(("kind", "share"), [("selective", 0.9), ("full", 0.7)])
def test_recomputing_keeps_less_on_the_card(kind, share, device):
    peaks = []
    for recompute in ("none", kind):
        trainer, batches = step_of(device, batch_size=64, context_length=128)
        recompute_activations(trainer.model, recompute)
        gradients_of(trainer, batches)
        trainer.model.zero_grad()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        gradients_of(trainer, batches)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    assert peaks[1] < share * peaks[0]


@pytest.mark.parametrize("settings", [{}, {"softcap": 1.5}, {"z_loss": 0.1}], ids=str)
def test_cross_entropy_from_hidden_states_is_that_of_the_processor(settings, device):
    hidden, weight, targets = made(900, 48, 4096, torch.float32)  # in several chunks
    results = []
    for where in (device, "cpu"):
        inputs = [tensor.detach().to(where).requires_grad_() for tensor in (hidden, weight)]
        loss = linear_cross_entropy(*inputs, targets.to(where), **settings)
        results.append([loss, *torch.autograd.grad(3 * loss, inputs)])
    for found, expected in zip(*results, strict=True):
        assert relative_difference(found, expected) < 1e-5


def test_log_probs_and_divergences_from_hidden_states_are_those_of_the_processor(device):
    *pair, mask = made_pair(900, (48, 32), 4096)  # masked tokens are computed with the others
    targets = made(900, 48, 4096)[2]
    results = []
    for where in (device, torch.device("cpu")):
        inputs = [tensor.detach().to(where).requires_grad_() for tensor in pair]
        outputs = [
            *token_log_probs(*inputs[:2], targets.to(where), temperature=0.7, softcap=2.0),
            *(head_divergence(*inputs, kind, mask_N=mask.to(where), beta=0.3, teacher_softcap=2.0) for kind in DIVERGENCES),
        ]
        outputs = [output.cpu() for output in outputs]
        results.append([*outputs, *torch.autograd.grad(weighed(outputs), inputs[:2])])
    for found, expected in zip(*results, strict=True):
        assert relative_difference(found, expected) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_cross_entropy_stays_near_float32_and_sums_in_it(dtype, device):
    hidden, weight, targets = (tensor.detach().to(device) for tensor in made(900, 48, 4096, torch.float32))
    weight.requires_grad_()
    exact = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast(device.type, dtype):
        rounded = linear_cross_entropy(hidden, weight, targets)
    assert rounded.dtype == torch.float32
    assert relative_difference(rounded, exact) < 0.01
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (rounded, exact)]
    assert gradients[0].dtype == torch.float32 and relative_difference(*gradients) < 0.02
