import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.data.batch import Batch
from bessemer.training.model_setup import narrow_residuals, recompute_activations, use_float8
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


@pytest.mark.parametrize("gathers", [True, False])
def test_sharded_weights_of_float8_are_gathered_in_it(decoder, gathers, monkeypatch):
    asked = {}
    package = ModuleType("torchao.float8")
    package.Float8LinearConfig = lambda **settings: settings

    def convert(model, *, module_filter_fn, config):
        asked.update(config)
        assert not module_filter_fn(model.norm, "norm")

    package.convert_to_float8_training = convert
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", package)
    use_float8(decoder, gathers=gathers)
    assert asked == {"enable_fsdp_float8_all_gather": gathers}


def test_a_residual_stream_in_bfloat16_is_kept_so_and_changes_the_loss_little(decoder):
    tokens_BT = torch.randint(0, decoder.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    seen = []
    for block in decoder.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return float(functional.cross_entropy(decoder(tokens_BT)[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten()))

    before = loss()
    assert set(seen) == {torch.float32}
    seen.clear()
    narrow_residuals(decoder)
    assert loss() == pytest.approx(before, rel=0.02)
    assert set(seen) == {torch.bfloat16}
