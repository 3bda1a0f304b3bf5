"""On MPS, which has no float64, everything of training and quantisation that widens sums computes what a CPU does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bessemer.distributed.collectives import clip_gradients, local_squares
from bessemer.distributed.mesh import ALONE
from bessemer.evaluation.quantisation import _of_targets
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.quantisation.base import Codes
from bessemer.model.quantisation.calibration import Statistics
from bessemer.model.quantisation.quantise import gptq
from bessemer.model.quantisation.schemes import W8A8, Int4, int8_product, integer_product
from bessemer.training.data.batch import Batch
from bessemer.training.model_setup import prepare_model
from bessemer.training.monitoring.diagnostics import Diagnostics
from bessemer.training.objectives import next_token_loss
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.routing import balance_experts, router_losses, routing_metrics, visits_by_layer
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer
from tests.cases import slow

from .pretended_mps import MPS, pretended_mps, to_mps

SPARSE = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=40,
    num_experts=4,
    moe_intermediate_size=16,
    router_aux_loss_coef=0.01,
    router_z_loss_coef=0.001,
    router_correction_bias=True,
    router_bias_update_rate=0.01,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch():
    tokens_BT = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(0))
    sources_BT = (tokens_BT[:, :-1] % 2).to(torch.int16)
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], sources_BT=sources_BT, source_names=("even", "odd"))


def weights_of(model):
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])


def test_the_pretended_device_refuses_float64_and_tensors_of_the_cpu():
    with pretended_mps():
        there = torch.ones(2).to(MPS)
        assert there.device == MPS and (there + 1).sum().item() == 4
        with pytest.raises(TypeError, match="no float64"):
            there.double()
        with pytest.raises(RuntimeError, match="to be on one device"):
            there + torch.ones(2)


def test_sums_over_processes_are_float64_on_the_cpu():
    with pretended_mps():
        values = torch.tensor([1.0, 2.0]).to(MPS)
        for found in (ALONE.sum(values), ALONE.largest(values)):
            assert (found.device.type, found.dtype, found.tolist()) == ("cpu", torch.float64, [1.0, 2.0])


def test_gradients_are_measured_and_clipped():
    gradients = [random(5, 7), 3 * random(6, seed=1)]
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    less = random(5, 7, seed=2)
    with pretended_mps():
        there = [torch.nn.Parameter(torch.zeros_like(gradient).to(MPS)) for gradient in gradients]
        for parameter, gradient in zip(there, gradients, strict=True):
            parameter.grad = gradient.to(MPS)
        squares = [local_squares(parameter.grad, ALONE) for parameter in there]
        assert {(square.device.type, square.dtype) for square in squares} == {("cpu", torch.float64)}
        assert float(sum(squares)) == pytest.approx(norm**2, rel=1e-6)
        found = local_squares(there[0].grad, ALONE, less)
        assert float(found) == pytest.approx(float((gradients[0] - less).square().sum()), rel=1e-6)
        assert float(clip_gradients(there, 1.0, ALONE)) == pytest.approx(norm, rel=1e-6)
        assert float(sum(local_squares(parameter.grad, ALONE) for parameter in there)) == pytest.approx(1, rel=1e-5)


def test_router_losses_and_biases_are_those_of_the_cpu():
    def routed(model, of):
        loss = next_token_loss(model, of)
        loss.backward()
        figures = routing_metrics(visits_by_layer(model))
        # as the training loop does: the step's tokens are summed over all processes first
        balance_experts(model, ALONE.sum(visits_by_layer(model)))
        biases = [block.mlp.router.correction_bias.tolist() for block in model.blocks]
        return loss.item(), router_losses(model, of.targets_BT).item(), figures, biases

    expected = routed(initial_decoder(SPARSE, 1).train(), batch())
    with pretended_mps():
        found = routed(to_mps(initial_decoder(SPARSE, 1).train()), batch().to(MPS))
    assert found[:2] == pytest.approx(expected[:2], rel=1e-6)
    assert found[2:] == expected[2:] and any(map(any, expected[3]))


def test_gptq_gives_the_codes_of_the_cpu():
    inputs, weight, scheme = random(200, 64) @ random(64, 64, seed=2), random(24, 64, seed=1), Int4(32)

    def codes(device):
        statistics = Statistics(64, torch.device(device))
        statistics.add(inputs.to(device))
        return gptq(weight.to(device), statistics, scheme, damping=0.01, activation_order=True).tensors["codes"]

    expected = codes("cpu")
    with pretended_mps():
        found = codes(MPS)
        assert found.device == MPS
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("inputs", [64, 1024, 5000])
def test_sums_of_products_of_int8_are_exact(inputs):
    # of one sign, so that they leave the 24 bits of float32
    left, right = (torch.randint(100, 128, (8, inputs), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with pretended_mps():
        found = integer_product(left.to(torch.int8).to(MPS), right.to(torch.int8).to(MPS))
        assert found.cpu().tolist() == (left @ right.T).tolist()


def test_layers_with_int8_activations_give_what_they_give_on_the_cpu():
    codes = torch.randint(-127, 128, (3, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    weight, hidden = Codes(W8A8(), {"codes": codes, "scales": torch.full((3, 1), 0.5)}), random(4, 64)
    expected = int8_product(hidden, weight, None)
    with pretended_mps():
        there = Codes(weight.scheme, {name: tensor.to(MPS) for name, tensor in weight.tensors.items()})
        assert torch.equal(int8_product(hidden.to(MPS), there, None).cpu(), expected)


def test_two_models_are_compared():
    log_NV, targets_N = functional.log_softmax(random(30, 11), -1), torch.arange(30) % 11
    expected = _of_targets(log_NV, targets_N)
    with pretended_mps():
        found = _of_targets(log_NV.to(MPS), targets_N.to(MPS))
        assert found.dtype == torch.float64 and found.cpu().item() == expected.item()


@pytest.mark.parametrize("optimizer", [slow("adamw"), "muon"])
def test_a_step_with_diagnostics_is_that_of_the_cpu(optimizer):
    def stepped(device):
        config = PretrainConfig(
            steps=1, batch_size=2, context_length=16, dtype="float32", compile=False, threads=1, optimizer=optimizer
        )
        model = initial_decoder(SPARSE, 1)
        if device == MPS:
            model = to_mps(model)
        runtime = Runtime.of(config, device)
        diagnostics = Diagnostics(model, config, ALONE)
        model, _ = prepare_model(model, config, runtime, ALONE)
        before = weights_of(model)
        trainer = Trainer(model, build_optimizers(model, config), next_token_loss, runtime, gradient_clip=1.0)
        of_step = diagnostics.of_step(1, trainer, batch())
        result = trainer.step(batch(), of_step.wrap_accept(lambda loss, norm: True))
        metrics = of_step.metrics()
        return result, metrics | {"peak_memory_bytes": 0}, weights_of(model) - before

    result, metrics, update = stepped(torch.device("cpu"))
    with pretended_mps():
        there, found, update_there = stepped(MPS)
    assert (there.loss, there.gradient_norm) == pytest.approx((result.loss, result.gradient_norm), rel=1e-5)
    assert found == pytest.approx(metrics, rel=1e-3) and "loss/odd" in metrics
    assert (update_there - update).norm() <= 1e-4 * update.norm()
