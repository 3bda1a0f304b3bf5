"""Adapters in training: they begin as nothing, their gradients are those of the merged weights, and codes stay codes."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLayer
from torch import nn

from bessemer.core.errors import ConfigError
from bessemer.model.adapters.trained import adapter_of, adapters_of, add_adapters, initial_tensors, merged, without_adapters
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_decoder import dequantised

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "vocab_size": 97,
}
TOKENS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def base(scheme=None):
    model = initial_decoder(ModelConfig(**SHAPE), seed=1)
    if scheme is not None:
        quantise(model, QuantizeConfig(scheme=scheme, group_size=32 if scheme == "int4" else None))
    return model


def adapted(model, *, trained=True, **options):
    updates = add_adapters(model, **{"rank": 4, "scale": 0.5, **options})
    model.load_state_dict(initial_tensors(model, seed=0), strict=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for update in updates.values() if trained else ():
            update.up.copy_(torch.randn(update.up.shape, generator=generator) * 0.05)
            if update.magnitude is not None:
                update.magnitude.mul_(0.5 + torch.rand(update.magnitude.shape, generator=generator))
    return model


def test_before_its_first_step_an_adapter_changes_nothing_and_its_base_has_no_gradients():
    expected = base()(TOKENS)
    model = adapted(base(), trained=False)
    logits = model(TOKENS)
    assert torch.equal(logits, expected)
    logits.logsumexp(-1).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient and all(".adapter." in name for name in with_gradient)
    # B is zero, so that A has a gradient of zeros, and B one that is not
    for update in adapters_of(model).values():
        assert not update.down.grad.any() and update.up.grad.any()


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_outputs_and_gradients_are_those_of_the_weights_with_the_updates_in_them(scheme):
    """With dW the gradient of a merged weight, that of B is s·dW Aᵀ and that of A is s·Bᵀ dW."""
    model = adapted(base(scheme))
    whole = merged(model, adapter_of(model)).requires_grad_(True)
    logits, expected = model(TOKENS), whole(TOKENS)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    assert len(adapters_of(model)) == 14
    for name, update in adapters_of(model).items():
        gradient_NK = whole.get_submodule(name).weight.grad
        torch.testing.assert_close(update.up.grad, 0.5 * gradient_NK @ update.down.detach().T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(update.down.grad, 0.5 * update.up.detach().T @ gradient_NK, rtol=1e-3, atol=1e-4)


def test_with_magnitudes_an_adapter_begins_as_nothing_too():
    torch.testing.assert_close(adapted(base(), trained=False, magnitude=True)(TOKENS), base()(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_outputs_and_gradients_with_magnitudes_are_those_of_peft(scheme):
    """Of each layer, on its own input: `peft` takes the norm as a constant, too."""
    model = adapted(base(scheme), magnitude=True)
    whole = merged(model, adapter_of(model))
    torch.testing.assert_close(whole(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(4)
    for name, update in adapters_of(model).items():
        layer = model.get_submodule(name)
        outputs, inputs = layer.weight.shape
        plain = nn.Linear(inputs, outputs, bias=False)
        plain.weight.data = layer.weight.detach().clone()
        theirs = LoraLayer(plain, "one", LoraConfig(r=4, lora_alpha=2, use_dora=True), r=4, lora_alpha=2)
        with torch.no_grad():
            theirs.lora_A["one"].weight.copy_(update.down)
            theirs.lora_B["one"].weight.copy_(update.up)
            theirs.lora_magnitude_vector["one"].weight.copy_(update.magnitude)
        hidden = torch.randn(3, 5, inputs, generator=generator)
        factors = torch.randn(3, 5, outputs, generator=generator)
        found, expected = layer(hidden), theirs(hidden)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        (found * factors).sum().backward()
        (expected * factors).sum().backward()
        for ours, other in (
            (update.down, theirs.lora_A["one"].weight),
            (update.up, theirs.lora_B["one"].weight),
            (update.magnitude, theirs.lora_magnitude_vector["one"].weight),
        ):
            torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_the_backward_pass_of_a_quantised_layer_keeps_codes_and_no_weights():
    model = adapted(base("int4"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(TOKENS)
    matrices = {tuple(part.shape) for name, part in model.named_modules() if name.endswith("_proj")}
    assert matrices and not [tensor for tensor in kept if tensor.is_floating_point() and tuple(tensor.shape) in matrices]


def test_without_its_adapter_a_model_is_its_base():
    model = adapted(base())
    with without_adapters(model):
        assert torch.equal(model(TOKENS), base()(TOKENS))
    assert not torch.equal(model(TOKENS), base()(TOKENS))


def test_merging_leaves_the_model_as_it_is():
    model = adapted(base("int8"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = merged(model, adapter_of(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert whole.state_dict().keys() == dequantised(base("int8")).state_dict().keys()


def test_dropout_takes_a_share_of_what_an_update_sees_in_training_alone():
    model = adapted(base(), dropout=0.5)
    model.eval()
    assert torch.equal(model(TOKENS), adapted(base())(TOKENS))
    model.train()
    update = adapters_of(model)["layers.0.mlp.up_proj"]
    seen = update(torch.ones(4000, 64)).mean(0)
    torch.testing.assert_close(seen, 0.5 * (update.up @ update.down.sum(1)).detach(), rtol=0.1, atol=0.02)


def test_layers_are_chosen_by_patterns_of_their_names():
    assert {name.rpartition(".")[2] for name in adapters_of(adapted(base(), patterns=["[qv]_proj"]))} == {"q_proj", "v_proj"}
    assert len(adapters_of(adapted(base(), patterns=["layers.1.*"]))) == 7
    with pytest.raises(ConfigError, match=r"no linear layer is called 'q_porj'; did you mean 'q_proj'"):
        adapted(base(), patterns=["q_porj"])
