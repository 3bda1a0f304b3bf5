from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.model.families import layout as file_patterns
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_layers import QuantisedLinear, quantised_parts
from bessemer.model.storage.folder import load_model, save_model
from bessemer.model.storage.model_config import read_model_config
from tests.cases import slow_but
from tests.model.family_models import CASES, OF_EACH_KIND, make
from tests.model.randomised import SHAPES, random_decoder, random_tokens

# widths that 128, 64 and 32 divide
PLAIN = SHAPES["grouped"].with_changes(
    vocab_size=102, hidden_size=128, num_hidden_layers=2, num_key_value_heads=2, head_dim=32, intermediate_size=192
)
SETTINGS = {
    "int8": {"scheme": "int8"},
    "int8, head as it is": {"scheme": "int8", "head": "none"},
    "int8 in groups": {"scheme": "int8", "group_size": 32},
    "int4": {"scheme": "int4"},
    "int4 with zeros": {"scheme": "int4", "symmetric": False},
    "int4, head too": {"scheme": "int4", "head": "int4"},
    "w8a8": {"scheme": "w8a8"},
}


def logits(model, tokens_BT):
    with torch.no_grad():
        found = model(tokens_BT)
    return getattr(found, "logits", found)


def quantised_decoder(config, **settings):
    model = random_decoder(config)
    quantise(model, QuantizeConfig(**settings))
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_quantised_model_is_opened_with_the_same_logits(settings, tied, tmp_path):
    model = quantised_decoder(PLAIN.with_changes(tie_word_embeddings=tied), **settings)
    save_model(model, tmp_path, tokenizer=None)
    again, tokens_BT = load_model(tmp_path), random_tokens(PLAIN, 2, 20)
    assert torch.equal(logits(again, tokens_BT), logits(model, tokens_BT))
    assert {name: part.scheme for name, part in quantised_parts(again).items()} == {
        name: part.scheme for name, part in quantised_parts(model).items()
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["int8", "int8, head as it is", "int8 in groups", "int4"])
def test_transformers_opens_a_quantised_folder_with_our_logits(name, tied, tmp_path):
    model = quantised_decoder(PLAIN.with_changes(tie_word_embeddings=tied), **SETTINGS[name])
    save_model(model, tmp_path, tokenizer=None)
    twin, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    tokens_BT = random_tokens(PLAIN, 2, 20)
    assert (logits(twin, tokens_BT) - logits(model, tokens_BT)).abs().max() <= 1e-4


def test_transformers_computes_int8_activations_as_we_do(tmp_path):
    model = quantised_decoder(PLAIN, scheme="w8a8")
    save_model(model, tmp_path, tokenizer=None)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens_BT = random_tokens(PLAIN, 2, 20)
    # layer by layer: over the whole network, a rounding that falls the other way grows
    assert (logits(twin, tokens_BT) - logits(model, tokens_BT)).abs().median() <= 0.02
    for name, part in quantised_parts(model).items():
        if name != "embed_tokens":
            hidden = torch.randn(3, 7, part.in_features, generator=torch.Generator().manual_seed(0))
            assert (twin.model.get_submodule(name)(hidden) - part(hidden)).abs().max() <= 1e-4


def test_compressed_tensors_reads_zeros_that_are_codes(tmp_path):
    # transformers 5.24 has no place for packed zeros, so the format's own package is asked
    model = quantised_decoder(PLAIN, **SETTINGS["int4 with zeros"])
    save_model(model, tmp_path, tokenizer=None)
    settings = QuantizationConfig.model_validate(
        json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    )
    weights, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.down_proj"
    schemes = [group for group in settings.config_groups.values() if not group.weights.symmetric]
    sizes = {group.weights.group_size: group for group in schemes}
    local = {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(name)}
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(local, sizes[64])["weight"]
    ours = model.layers[1].mlp.down_proj
    assert ours.zeros.unique().numel() > 1
    assert (theirs.float() - ours.weight).abs().max() <= 2e-3  # theirs is computed in float16


def test_transformers_refuses_what_its_format_has_no_place_for(tmp_path):
    save_model(quantised_decoder(PLAIN, scheme="int4", head="int4"), tmp_path, tokenizer=None)
    with pytest.raises(ValueError, match="bessemer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read_model_config(tmp_path) == PLAIN.with_changes(model_type="qwen3")


@pytest.mark.parametrize("case", slow_but(OF_EACH_KIND, CASES))
def test_every_architecture_is_quantised_and_opened_with_the_same_logits(case, tmp_path):
    make(case).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    tokens_BT = random_tokens(model.config, 1, 12)
    before = logits(model, tokens_BT)
    quantise(model, QuantizeConfig(scheme="int8"))
    save_model(model, tmp_path / "ours", tokenizer=None)
    again = load_model(tmp_path / "ours")
    assert torch.equal(logits(again, tokens_BT), logits(model, tokens_BT))
    assert again.config == model.config
    # every matrix but the router's, and those that the quantised ones left close to what they were
    assert 0 < (logits(again, tokens_BT) - before).abs().mean() <= 0.1 * before.abs().mean()


def test_a_matrix_that_the_group_does_not_divide_gets_a_smaller_one_and_a_note(tmp_path):
    model = random_decoder(PLAIN)
    notes = quantise(model, QuantizeConfig(scheme="int4"))
    assert model.layers[0].mlp.down_proj.scheme.group_size == 64 and model.layers[0].mlp.up_proj.scheme.group_size == 128
    assert notes == ["2 matrices with 192 inputs, which 128 does not divide: groups of 64"]


def test_a_quantised_model_is_not_quantised_again():
    with pytest.raises(ConfigError, match="quantised already"):
        quantise(quantised_decoder(PLAIN), QuantizeConfig())


def test_a_model_opened_in_another_type_reads_its_codes_in_that_type(tmp_path):
    save_model(quantised_decoder(PLAIN), tmp_path, tokenizer=None)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 == logits(model, random_tokens(PLAIN, 1, 4)).dtype
    layer = model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantisedLinear) and layer.scales.dtype == torch.float32


def test_a_missing_tensor_of_codes_is_named(tmp_path):
    save_model(quantised_decoder(PLAIN), tmp_path, tokenizer=None)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ArtefactError, match=r"mlp\.up_proj\.weight_scale' is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq'"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3}}}}, "not supported"),
        ({"ignore": ["re:(a|[a-z0-9._]|[a-z0-9._]{2})+[!?]"]}, r"quantization_config: .* takes more than 0\.1 s to match"),
        ({"ignore": ["re:("]}, r"quantization_config: '\(' is no regular expression"),
    ],
)
def test_a_way_of_quantising_that_is_not_known_is_refused(changes, said, tmp_path, monkeypatch):
    monkeypatch.setattr(file_patterns, "_SECONDS", 0.1)
    save_model(quantised_decoder(PLAIN), tmp_path, tokenizer=None)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["quantization_config"] |= changes
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ArtefactError, match=said):
        load_model(tmp_path)


def test_the_repetition_of_a_repetition_is_matched_in_linear_time(tmp_path):
    """`re` takes longer than anybody waits."""
    patterns = file_patterns.FilePatterns(tmp_path)
    assert not patterns.matches("^([a-z0-9._]+)+!$", "model.layers.0.self_attn.q_proj" * 4, "ignore")
