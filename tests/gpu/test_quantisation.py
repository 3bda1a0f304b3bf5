"""Quantised models on a card: their codes, and that they compute what they compute on the processor."""

from __future__ import annotations

import pytest
import torch

from bessemer.inference.engine import Engine, EngineConfig
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.integers import unpack
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_layers import QuantisedLinear, quantised_parts
from bessemer.model.storage.folder import load_model, save_model
from tests.gpu.comparison import assert_same_but_for_ties
from tests.inference.models import ARCHITECTURES, BASE
from tests.inference.test_identity import PARAMS, PROMPTS
from tests.model.randomised import random_decoder, random_tokens
from tests.model.test_quantised_folder import SETTINGS, logits

pytestmark = pytest.mark.gpu

#: Widths that groups of 32 divide.
WIDE = BASE.with_changes(hidden_size=128, head_dim=32, intermediate_size=192)
#: One that is soon calibrated.
SMALL = BASE.with_changes(hidden_size=64, head_dim=16, intermediate_size=96, num_hidden_layers=2)
#: With activations of 8 bits, one that falls to the other side of a half is another code.
FLOATING = {name: settings for name, settings in SETTINGS.items() if settings["scheme"] != "w8a8"}


def quantised_decoder(device="cpu", config=WIDE, rows_RT=None, **settings):
    model = random_decoder(config).to(device)
    quantise(model, QuantizeConfig(**settings), rows_RT)
    return model


@pytest.mark.parametrize("settings", FLOATING.values(), ids=FLOATING)
def test_a_folder_is_opened_on_the_card_with_the_logits_of_the_processor(settings, device, tmp_path):
    save_model(quantised_decoder(**settings), tmp_path, tokenizer=None)
    here, there, tokens_BT = load_model(tmp_path, device), load_model(tmp_path), random_tokens(WIDE, 2, 60)
    assert {tensor.device.type for tensor in (*here.parameters(), *here.buffers())} == {device.type}
    assert (logits(here, tokens_BT.to(device)).cpu() - logits(there, tokens_BT)).abs().max() < 1e-3


def test_quantised_experts_have_the_logits_of_the_processor(device):
    config = WIDE.with_changes(**ARCHITECTURES["experts"] | {"moe_intermediate_size": 32})
    model, tokens_BT = quantised_decoder(config=config, scheme="int8"), random_tokens(config, 2, 60)
    expected = logits(model, tokens_BT)
    assert (logits(model.to(device), tokens_BT.to(device)).cpu() - expected).abs().max() < 1e-3


def test_activations_of_8_bits_meet_weights_of_8_bits_as_on_the_processor(device):
    model = quantised_decoder(scheme="w8a8")
    layers = [part for name, part in quantised_parts(model).items() if type(part) is QuantisedLinear]
    inputs = [torch.randn(5, 9, part.in_features, generator=torch.Generator().manual_seed(0)) for part in layers]
    expected = [part(hidden) for part, hidden in zip(layers, inputs, strict=True)]
    model.to(device)
    assert layers
    for part, hidden, wanted in zip(layers, inputs, expected, strict=True):
        error = (part(hidden.to(device)).cpu() - wanted).abs()
        assert error.median() < 1e-5 and error.max() < 0.05


@pytest.mark.parametrize("name", ["int8", "int4", "int4 with zeros"])
def test_codes_made_on_the_card_are_those_of_the_processor(name, device):
    found, expected = (quantised_parts(quantised_decoder(where, **SETTINGS[name])) for where in (device, "cpu"))
    assert found.keys() == expected.keys()
    for place, part in found.items():
        ours, theirs = (
            (unpack(one.codes) if one.scheme.bits == 4 else one.codes).cpu().int() for one in (part, expected[place])
        )
        # a scale that rounds the other way moves some codes to their neighbours
        assert (ours - theirs).abs().max() <= 1 and (ours != theirs).float().mean() < 0.01, place


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_codes_calibrated_on_the_card_change_the_logits_less_than_rounding(method, device):
    rows_RT, tokens_BT = random_tokens(SMALL, 32, 32, seed=1), random_tokens(SMALL, 8, 32).to(device)
    before, errors = logits(random_decoder(SMALL).to(device), tokens_BT), {}
    for each in ("rtn", method):
        model = quantised_decoder(device, SMALL, rows_RT, scheme="int4", group_size=32, method=each, head="none")
        errors[each] = float((logits(model, tokens_BT) - before).square().mean())
    assert 0 < errors[method] < errors["rtn"]


@pytest.mark.parametrize("attention", ["gather", "flex"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_answers_of_a_quantised_model_are_nearly_those_of_the_processor(name, attention, tokenizer, device):
    model = quantised_decoder(**SETTINGS[name])
    expected = Engine(model, tokenizer, config=EngineConfig(cpu_kernels="off")).generate(PROMPTS, PARAMS)
    engine = Engine(model.to(device), tokenizer, config=EngineConfig(paged_attention=attention))
    assert "codes multiplied by Triton kernels" in engine.arithmetic
    found = engine.generate(PROMPTS, PARAMS)
    assert_same_but_for_ties(found, expected, error=0.01, tie=0.01)  # pages are float16
