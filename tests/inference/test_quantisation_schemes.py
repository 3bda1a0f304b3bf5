"""A quantisation scheme of another package: one file, from the command's settings to generated tokens."""

from __future__ import annotations

import json

import pytest
import torch

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_decoder import dequantised
from bessemer.model.quantisation.quantised_layers import quantised_parts
from bessemer.model.storage.folder import load_model, save_model
from tests.inference.models import ARCHITECTURES, BASE, small_tokenizer
from tests.model.randomised import random_decoder, random_tokens
from tests.plugin_package import install

#: Floats of 8 bits with a scale for each output: a type that no scheme of ours has.
FLOAT8 = """
from dataclasses import dataclass

import torch

from bessemer.model.quantisation.config import SchemePlugin
from bessemer.model.quantisation.base import Codes, Scheme, TensorSpec


@dataclass(frozen=True)
class Float8(Scheme):
    name = "float8"

    @classmethod
    def choose(cls, inputs, config, *, is_end=False):
        return cls(), None

    def tensors(self, *shape):
        scales = (*shape[:-1], 1)
        return {"codes": TensorSpec(shape, torch.float8_e4m3fn), "scales": TensorSpec(scales, torch.float32)}

    def quantise(self, weight, *, search_clip=False):
        scales = weight.abs().amax(-1, keepdim=True) / 448
        return Codes(self, {"codes": (weight / scales).to(torch.float8_e4m3fn), "scales": scales})

    def dequantise(self, tensors):
        return tensors["codes"].float() * tensors["scales"]


PLUGIN = SchemePlugin("float8", "floats of 8 bits, a scale for each output", Float8)
"""
MODELS = {"dense": {}, "experts": ARCHITECTURES["experts"], "latent": ARCHITECTURES["latent"]}


@pytest.fixture
def float8(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    entry_points = {"bessemer.quantisation": {"float8": "float8_package:PLUGIN"}}
    install(tmp_path / "site", monkeypatch, "float8_package", FLOAT8, entry_points)


def greedy(decoder, prompt, count):
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(decoder(torch.tensor([tokens]))[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize("name", MODELS)
def test_a_scheme_of_another_package_is_quantised_kept_opened_and_served(name, float8, tmp_path):
    decoder = random_decoder(BASE.with_changes(**MODELS[name]))
    quantise(decoder, QuantizeConfig(scheme="float8", head="float8"))
    parts = quantised_parts(decoder)
    assert {type(part.scheme).__name__ for part in parts.values()} == {"Float8"}
    small_tokenizer(tmp_path)
    save_model(decoder, tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    again, tokens_BT = load_model(tmp_path / "model"), random_tokens(BASE, 2, 12)
    with torch.no_grad():
        assert torch.equal(again(tokens_BT), decoder(tokens_BT))
    # a code is a byte, and its type is no model's type
    assert all(part.codes.dtype == torch.float8_e4m3fn for part in quantised_parts(again.to(torch.bfloat16)).values())
    assert parts["embed_tokens"].scheme.nbytes(4, 48) == 4 * 48 + 4 * 4
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    served = Engine(tmp_path / "model", device="cpu", config=EngineConfig(threads=1)).generate([[1, 2, 3]], params)
    assert tuple(served[0].token_ids) == greedy(dequantised(decoder), [1, 2, 3], 6)


def test_what_a_scheme_does_not_do_is_said_where_it_is_asked_for(float8, tmp_path):
    for settings, message in (
        ({"method": "gptq"}, "float8 is rounded to nearest"),
        ({"group_size": 32}, "float8 has one scale"),
        ({"search_clip": True}, "search_clip"),
    ):
        with pytest.raises(ConfigError, match=message):
            QuantizeConfig.parse({"scheme": "float8", **settings})


def test_a_folder_whose_scheme_is_not_installed_is_refused_by_its_name(tmp_path):
    decoder = random_decoder(BASE.with_changes(hidden_size=64))
    quantise(decoder, QuantizeConfig(scheme="int8", head="int4"))
    save_model(decoder, tmp_path, tokenizer=None)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"]["modules"]["embed_tokens"] = {"scheme": "float8"}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ArtefactError, match="there is no scheme 'float8'"):
        load_model(tmp_path)
