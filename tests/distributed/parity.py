"""Some steps of training under a layout, and what must be the same as on one process: loss, every gradient, their norm, and
the weights after the last step."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from bessemer.distributed.layout import Layout, ParallelConfig
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.data.batches import StatelessBatches
from bessemer.training.model_setup import prepare_model
from bessemer.training.objectives import build_objective
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer

DENSE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TWO_LAYERS = DENSE | {"num_hidden_layers": 2}
SETTINGS = {
    "batch_size": 8,
    "context_length": 16,
    "dtype": "float32",
    "compile": False,
    "threads": 1,
    "steps": 2,
    "decay_fraction": 0.7,  # so that no step has another's learning rate
    "optimizer": "adamw",  # Muon has tests of its own
    "learning_rate": 0.01,
    "gradient_clip": 0.5,
}


def shallowest(parallel):
    """The model with a layer for each stage of a layout: two, or four."""
    config = ParallelConfig(**parallel)
    return DENSE if config.pipeline * config.stages_of_rank > 2 and config.pipeline > 1 else TWO_LAYERS


@dataclass
class Trained:
    """The full tensors of a run, by the names of the model's parameters and of its routers' biases; gradients are those of the
    first step, clipped."""

    losses: list
    norms: list
    gradients: dict
    weights: dict


class RandomBatches(StatelessBatches):
    """Made-up rows, a third of whose targets are masked, unevenly; `packed`: with several documents in each."""

    fingerprint = "random"

    def __init__(self, batch_size, length, vocab_size, packed=False):
        self.batch_size, self._shape, self._vocab_size, self._packed = batch_size, (batch_size, length), vocab_size, packed

    def batch(self, step, rows=slice(None), mesh=ALONE):
        generator = torch.Generator().manual_seed(step)
        tokens_BT = torch.randint(0, self._vocab_size, self._shape, generator=generator)
        targets_BT = torch.randint(0, self._vocab_size, self._shape, generator=generator)
        chance_B1 = torch.linspace(0, 0.8, self._shape[0])[:, None]
        targets_BT[torch.rand(self._shape, generator=generator) < chance_B1] = IGNORE_INDEX
        if not self._packed:
            return Batch(tokens_BT[rows], targets_BT[rows])
        columns_BT = torch.arange(self._shape[1]).expand(self._shape)
        length_B1 = torch.arange(3, 3 + self._shape[0])[:, None]
        positions_BT, documents_BT = columns_BT % length_B1, columns_BT // length_B1
        return Batch(tokens_BT[rows], targets_BT[rows], positions_BT[rows], documents_BT[rows])


def trained(parallel=None, model=DENSE, settings=(), dtype=torch.float64, packed=False):
    """Train a new model, on this process alone or (`parallel`, on every rank) under a layout; full tensors on rank 0."""
    config = PretrainConfig(**(SETTINGS | dict(settings) | {"parallel": parallel or {}}))
    mesh = ALONE
    if parallel is not None:
        mesh = Mesh.of(Layout.of(ParallelConfig(**parallel), torch.distributed.get_world_size()), "cpu")
    decoder = initial_decoder(ModelConfig(**model), seed=3).to(dtype)
    batches = RandomBatches(config.batch_size, config.context_length, decoder.config.vocab_size, packed)
    return trained_on(decoder, batches, config, mesh)


def trained_on(decoder, batches, config, mesh):
    """Train a decoder on batches; full tensors on rank 0."""
    decoder.train()
    runtime = Runtime.of(config, torch.device("cpu"))
    parts, pipeline = prepare_model(decoder, config, runtime, mesh)
    optimizers = build_optimizers(parts, config)
    trainer = Trainer(
        parts,
        optimizers,
        build_objective(config, decoder.config),
        runtime,
        gradient_clip=config.gradient_clip,
        micro_batch_size=config.micro_batch_size,
        mesh=mesh,
        pipeline=pipeline,
    )
    losses, norms, gradients = [], [], {}
    for number in range(config.steps):

        def keep(loss, norm, first=number == 0):
            if first:
                gradients.update(full({name: parameter.grad for name, parameter in parts.named_parameters()}, mesh))
            return True

        outcome = trainer.step(trainer.read(batches, number), keep)
        losses.append(outcome.loss)
        norms.append(outcome.gradient_norm)
    biases = {name: buffer for name, buffer in parts.named_buffers() if name.endswith("correction_bias")}
    weights = full(dict(parts.named_parameters()) | biases, mesh)
    return Trained(losses, norms, gradients, weights) if mesh.leads else None


def full(tensors, mesh):
    """Whole tensors by name, of all the stages of a pipeline together."""
    whole = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
        if tensor is not None
    }
    if mesh.layout.pipeline == 1:
        return whole
    everyone = [None] * mesh.layout.world_size
    torch.distributed.all_gather_object(everyone, whole)
    return {name: tensor for one in everyone for name, tensor in one.items()}


#: Norm below which a tensor is one of zeros and roundings: without positions, a bias of all keys changes nothing.
ZERO = 1e-10


def assert_equal(found, expected, tolerance):
    """‖a − b‖ / ‖b‖ of every tensor, and every loss and norm, within the tolerance."""
    assert found.gradients.keys() == expected.gradients.keys()
    for kind in ("gradients", "weights"):
        for name, tensor in getattr(expected, kind).items():
            if tensor.norm() < ZERO:
                assert getattr(found, kind)[name].norm() < ZERO, (kind, name)
                continue
            difference = (getattr(found, kind)[name] - tensor).norm() / tensor.norm()
            assert difference <= tolerance, (kind, name, float(difference))
    for kind in ("losses", "norms"):
        for here, there in zip(getattr(found, kind), getattr(expected, kind), strict=True):
            assert abs(here - there) <= tolerance * abs(there), (kind, here, there)
