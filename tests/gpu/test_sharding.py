"""Sharded training on one card, under NCCL: the step of a model that is not sharded."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from bessemer.distributed.layout import Layout
from bessemer.distributed.mesh import Mesh, Seat, joined, local
from bessemer.distributed.sharding import apply_fsdp
from bessemer.training.objectives import next_token_loss
from bessemer.training.optim.optimizers import build_optimizers, step_optimizers
from bessemer.training.pretrain_config import PretrainConfig
from tests.distributed.parity import SETTINGS, RandomBatches
from tests.gpu.comparison import relative_difference
from tests.inference.models import small_decoder

pytestmark = pytest.mark.gpu


@pytest.fixture
def mesh(device, tmp_path):
    """The mesh of a job of one process, with a group for every axis, which a run on one process does without."""
    with joined(torch.device(device.type, 0), 60.0, Seat(0, 1, tmp_path / "job")):
        axes = ("pipeline", "data_replicate", "shard", "tensor")
        yield Mesh(Layout(), dense=init_device_mesh(device.type, (1, 1, 1, 1), mesh_dim_names=axes))


def stepped(model, device, steps=2, optimizer="adamw"):
    """The model's gradients in the last of some steps, and its weights after it, as this rank holds them."""
    config = PretrainConfig(**SETTINGS | {"optimizer": optimizer})
    first, *_ = optimizers = build_optimizers(model, config)
    batches = RandomBatches(config.batch_size, config.context_length, model.config.vocab_size)
    for number in range(steps):
        next_token_loss(model, batches.batch(number).to(device)).backward()
        gradients = {name: local(parameter.grad).clone() for name, parameter in model.named_parameters()}
        step_optimizers(optimizers)
    return gradients, {name: local(parameter) for name, parameter in model.named_parameters()}, first


@pytest.mark.parametrize("name", ["dense", "experts", "linear", "latent"])
def test_matrices_gathered_in_bfloat16_give_the_step_of_those_that_autocast_casts(name, mesh, device):
    results = []
    for dtype in (torch.bfloat16, None):
        model = small_decoder(name).to(device).train()
        apply_fsdp(model, mesh, dtype=dtype)
        with torch.autocast(device.type, torch.bfloat16):
            loss = next_token_loss(model, RandomBatches(4, 32, model.config.vocab_size).batch(0).to(device))
        loss.backward()
        results.append((loss, {place: local(parameter.grad) for place, parameter in model.named_parameters()}))
    (found_loss, found), (loss, expected) = results
    assert relative_difference(found_loss, loss) < 1e-5
    for place, gradient in expected.items():
        assert found[place].dtype == torch.float32
        assert relative_difference(found[place], gradient) < 1e-3, place


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_step_of_an_optimizer_is_that_of_the_whole_model(optimizer, mesh, device):
    whole, parts = (small_decoder("experts").to(device).train() for _ in range(2))
    start = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    apply_fsdp(parts, mesh)
    _, weights, _ = stepped(parts, device, optimizer=optimizer)
    _, expected, _ = stepped(whole, device, optimizer=optimizer)
    for place, weight in expected.items():
        # Muon's products are in bfloat16
        assert relative_difference(weights[place], weight, start[place]) < 0.05, place


@pytest.mark.parametrize("name", ["dense", "experts", "linear"])
@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
def test_a_sharded_step_is_that_of_the_whole_model(name, offload, mesh, device):
    whole, parts = (small_decoder(name).to(device).train() for _ in range(2))
    apply_fsdp(parts, mesh, offload=offload)
    gradients, weights, optimizer = stepped(parts, device)
    expected_gradients, expected_weights, _ = stepped(whole, device)
    held = {"cpu"} if offload else {device.type}
    assert {tensor.device.type for tensor in weights.values()} == held
    states = [local(value) for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert {value.device.type for value in states} == held
    for place, expected in expected_gradients.items():
        assert relative_difference(gradients[place], expected) < 1e-3, place
        assert relative_difference(weights[place], expected_weights[place]) < 1e-3, place
