"""AdamW with its means in pages: the same weights as AdamW's, and a checkpoint that goes on."""

import copy
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW

from bessemer.core.errors import ConfigError
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.optim.paged import PagedAdamW
from bessemer.training.pretrain_config import PretrainConfig

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def parameters(device):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in ((5, 7), (3,), (2, 4, 3))]


def step(optimizer, weights, number):
    generator = torch.Generator().manual_seed(number)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.device)
    optimizer.step()


def groups(weights):
    return [{"params": weights[:1], "lr": 0.1, "weight_decay": 0.2}, {"params": weights[1:], "lr": 0.01, "weight_decay": 0.0}]


@pytest.mark.parametrize("device", DEVICES)
def test_the_weights_are_those_of_adamw_bit_for_bit_also_after_a_checkpoint(device):
    plain, paged = parameters(device), parameters(device)
    theirs, ours = AdamW(groups(plain), betas=(0.9, 0.99), fused=True), PagedAdamW(groups(paged), betas=(0.9, 0.99))
    for number in range(3):
        step(theirs, plain, number)
        step(ours, paged, number)
    # a new optimizer gets the states of a checkpoint, which PyTorch puts on the device
    resumed = PagedAdamW(groups(paged), betas=(0.9, 0.99))
    resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    for number in range(3, 6):
        step(theirs, plain, number)
        step(resumed, paged, number)
    assert all(torch.equal(one, other) for one, other in zip(plain, paged, strict=True))
    assert all(resumed.state[weight]["exp_avg"].device.type == "cpu" for weight in paged)


def test_the_means_lie_in_mapped_files():
    weights = parameters("cpu")
    optimizer = PagedAdamW(groups(weights), betas=(0.9, 0.99))
    step(optimizer, weights, 1)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = [line for line in maps if "bessemer-optimizer-" in line]
    assert len(mapped) == 2 * len(weights)


def test_a_recipe_may_page_adamw_alone():
    config = PretrainConfig(steps=1, optimizer="adamw", optimizer_paging=True)
    assert isinstance(build_optimizers(torch.nn.Linear(3, 2), config)[0], PagedAdamW)
    with pytest.raises(ConfigError, match="optimizer_paging: of AdamW's states of 32 bits"):
        PretrainConfig.parse({"steps": 1, "optimizer": "muon", "optimizer_paging": True}, "pretrain")
