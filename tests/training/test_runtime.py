"""A block compiled as one C++ file a pass is the block compiled kernel by kernel, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bessemer.training.autotune import _random_batch
from bessemer.training.config import PretrainConfig
from bessemer.training.objectives import build_objective
from bessemer.training.optim.build import build_optimizers
from bessemer.training.runtime import Runtime
from bessemer.training.train_step import TrainStep
from tests.inference.models import small_decoder


def trained(name: str, alone: bool) -> list[torch.Tensor]:
    """The weights of a small model after three compiled steps."""
    config = PretrainConfig(steps=3, dtype="bfloat16", compile=True, batch_size=2, context_length=32, optimizer="adamw")
    runtime = Runtime.of(config, torch.device("cpu"), threads=2)
    with runtime.running():
        torch.manual_seed(0)
        model = small_decoder(name).train()
        runtime.compile_blocks(model, alone=alone)
        optimizers = build_optimizers(model, config, Path())
        step = TrainStep(model, optimizers, build_objective(config), runtime, gradient_clip=1.0)
        batch = _random_batch(config, model.config.vocab_size)
        for _ in range(3):
            step.run(batch)
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "experts", "latent", "linear"])
def test_one_file_a_pass_gives_the_weights_of_a_file_a_kernel(name):
    assert all(torch.equal(one, other) for one, other in zip(trained(name, True), trained(name, False), strict=True))
