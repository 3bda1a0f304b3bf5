"""Runs on a card that ask for determinism: the same bits in every run."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

#: Prints a hash of the weights after some steps in bfloat16; in a process of its own, since cuBLAS is set before CUDA is
#: initialised.
RUN = """
import sys
import torch
from bessemer.core.hashing import hash_bytes
from bessemer.distributed.mesh import ALONE
from bessemer.model.initialisation import initial_decoder
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.model_setup import prepare_model
from bessemer.training.objectives import build_objective
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer
from tests.distributed.parity import RandomBatches
from tests.inference.models import ARCHITECTURES, BASE

name, compiled, packing = sys.argv[1], sys.argv[2] == "compiled", sys.argv[3]
config = PretrainConfig(
    steps=6, batch_size=8, context_length=128, dtype="bfloat16", compile=compiled, packing=packing, deterministic=True
)
shape = BASE.with_changes(**ARCHITECTURES[name] | {"head_dim": 16})
runtime = Runtime.of(config, torch.device("cuda"))
with runtime.running():
    model, _ = prepare_model(initial_decoder(shape, seed=2).cuda(), config, runtime, ALONE)
    optimizers = build_optimizers(model, config)
    trainer = Trainer(model, optimizers, build_objective(config, model.config), runtime, gradient_clip=1.0)
    batches = RandomBatches(8, 128, shape.vocab_size, packed=packing == "documents")
    for step in range(6):
        trainer.step(batches.batch(step))
print(hash_bytes(*(parameter.detach().cpu().numpy().tobytes() for parameter in model.parameters())))
"""


def weights(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, encoding="utf-8", timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("compiled", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["dense", "experts"])
def test_two_runs_give_the_same_bits(name, compiled, packing, device):
    assert weights(name, compiled, packing) == weights(name, compiled, packing)
