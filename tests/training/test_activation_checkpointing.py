import pytest
import torch
from torch import nn

from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.data.batch import Batch
from bessemer.training.model_setup import recompute_activations, use_float8
from bessemer.training.objectives import next_token_loss

from .conftest import TINY

SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def kept_and_gradients(kind, extra, dropout=None):
    """Bytes that the forward pass keeps for the backward, weights aside, and the gradients. dropout: of each block's MLP."""
    shape = {name: value for name, value in TINY.items() if name != "preset"}
    model = initial_decoder(ModelConfig(**shape, **extra, vocab_size=97), seed=2).train()
    for block in model.blocks if dropout is not None else ():
        block.dropped_out = nn.Dropout(dropout)
        block.mlp.register_forward_hook(lambda module, inputs, output, block=block: block.dropped_out(output))
    recompute_activations(model, kind)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tokens_BT = torch.randint(0, 97, (4, 64), generator=torch.Generator().manual_seed(1))
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token_loss(model, Batch(tokens_BT, tokens_BT))
    loss.backward()
    return sum(kept.values()), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("extra", [{}, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputed_gradients_are_the_same_to_the_bit_and_less_is_kept(kind, extra):
    everything, expected = kept_and_gradients("none", extra)
    kept, found = kept_and_gradients(kind, extra)
    assert kept < everything * (0.8 if kind == "selective" else 0.4)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("extra", [{}, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_dropout_leaves_out_the_same_when_it_is_recomputed(kind, extra):
    _, expected = kept_and_gradients("none", extra, dropout=0.5)
    _, found = kept_and_gradients(kind, extra, dropout=0.5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    _, without = kept_and_gradients(kind, extra)
    assert not all(torch.equal(found[name], without[name]) for name in expected)


@pytest.mark.parametrize("dropout", [None, 0.0])
def test_without_dropout_no_random_state_is_copied(dropout, monkeypatch):
    monkeypatch.setattr("torch.get_rng_state", lambda: pytest.fail("copied"))
    kept_and_gradients("full", {}, dropout)


def test_float8_without_its_package_is_one_clear_line(decoder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match="float8: true needs the package torchao"):
        use_float8(decoder)
