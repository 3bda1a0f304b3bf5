"""4-bit NormalFloat: its numbers, its rounding, and bitsandbytes' own files in and out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bessemer.core.errors import ArtefactError
from bessemer.core.store import read_json, write_json
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.nf4 import LEVELS, NF4, dynamic_map
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_layers import quantised_parts
from bessemer.model.storage.folder import load_model, save_model

SHAPE = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    tie_word_embeddings=False,
)


def weights(outputs=40, inputs=128):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = initial_decoder(SHAPE, seed=3)
    quantise(model, QuantizeConfig(scheme="nf4"))
    save_model(model, tmp_path_factory.mktemp("nf4") / "model", tokenizer=None)
    return tmp_path_factory.getbasetemp() / "nf40" / "model", model


def test_every_weight_becomes_the_nearest_level_times_its_block_s_largest_magnitude():
    matrix_NK = weights()
    codes = NF4(double=False).quantise(matrix_NK)
    scales_NG = matrix_NK.unflatten(-1, (-1, 64)).abs().amax(-1)
    torch.testing.assert_close(codes.tensors["scales"], scales_NG)
    levels_L = torch.tensor(LEVELS)
    errors = (matrix_NK.unflatten(-1, (-1, 64))[..., None] - levels_L * scales_NG[..., None, None]).abs()
    torch.testing.assert_close((codes.dequantised() - matrix_NK).abs(), errors.amin(-1).flatten(-2))


def test_scales_as_codes_cost_little_and_a_weight_takes_4_13_bits():
    matrix_NK = weights(512, 1024)
    double, single = NF4(), NF4(double=False)
    assert 8 * double.nbytes(512, 1024) / matrix_NK.numel() == pytest.approx(4.127, abs=1e-3)
    errors = [(scheme.quantise(matrix_NK).dequantised() - matrix_NK).square().mean().sqrt() for scheme in (single, double)]
    assert errors[0] == pytest.approx(0.092, abs=0.002) and errors[1] < 1.01 * errors[0]
    # a block of zeros, and a stack of matrices
    stack = torch.stack([matrix_NK, torch.zeros_like(matrix_NK)])
    made = double.quantise(stack)
    assert torch.equal(made[0].dequantised(), double.quantise(matrix_NK).dequantised()) and not made[1].dequantised().any()


def test_the_dynamic_map_is_symmetric_but_for_its_ends_and_dense_at_zero():
    numbers = dynamic_map()
    assert len(numbers) == 256 and numbers[-1] == 1.0 and 0.0 in numbers
    inner = numbers[:-1]
    torch.testing.assert_close(inner, -inner.flip(0))
    assert float(numbers[numbers > 0].min()) == pytest.approx(5.5e-7)


def test_a_folder_is_in_the_form_of_bitsandbytes_and_is_read_back_bit_for_bit(folder):
    place, model = folder
    settings = read_json(place / "config.json")["quantization_config"]
    assert (settings["quant_method"], settings["bnb_4bit_quant_type"]) == ("bitsandbytes", "nf4")
    assert settings["llm_int8_skip_modules"] == ["lm_head"]
    stored = load_file(place / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    state = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    assert state["shape"] == [64, 192] and (state["blocksize"], state["nested_blocksize"]) == (64, 256)
    assert stored[name].shape == (64 * 192 // 2, 1) and stored[f"{name}.absmax"].dtype == torch.uint8
    again = load_model(place)
    for (key, part), other in zip(quantised_parts(model).items(), quantised_parts(again).values(), strict=True):
        assert all(torch.equal(tensor, other.tensors[each]) for each, tensor in part.tensors.items()), key
    tokens_BT = torch.arange(8)[None]
    torch.testing.assert_close(again(tokens_BT), model.eval()(tokens_BT), rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"load_in_4bit": False}, {"bnb_4bit_quant_type": "fp4"}])
def test_other_codes_of_bitsandbytes_are_refused_by_their_kind(folder, tmp_path, change):
    place, _ = folder
    values = read_json(place / "config.json")
    values["quantization_config"] |= change
    write_json(tmp_path / "config.json", values)
    with pytest.raises(ArtefactError, match="bitsandbytes in another way than nf4"):
        load_model(tmp_path)


def test_codes_and_numbers_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for double in (False, True):
        matrix_NK = weights()
        codes, state = functional.quantize_4bit(matrix_NK, blocksize=64, compress_statistics=double, quant_type="nf4")
        ours = NF4(double).quantise(matrix_NK)
        assert torch.equal(ours.tensors["codes"].reshape(-1, 1), codes)
        assert torch.equal(ours.tensors["scales"].flatten(), state.absmax)
        torch.testing.assert_close(ours.dequantised(), functional.dequantize_4bit(codes, state))


def test_transformers_reads_the_folder_with_bitsandbytes(folder):
    functional = pytest.importorskip("bitsandbytes.functional")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    place, model = folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, device_map="cpu")
    assert type(theirs.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    layer = theirs.model.layers[1].mlp.down_proj.weight
    whole = functional.dequantize_4bit(layer.data, layer.quant_state)
    torch.testing.assert_close(model.get_submodule("layers.1.mlp.down_proj").weight, whole)
    tokens_BT = torch.arange(8)[None]
    with torch.no_grad():
        logits, ours = theirs(tokens_BT).logits, model.eval()(tokens_BT)
    # its products on a processor are rounded to half precision
    assert float((ours - logits).abs().max()) < 0.02 * float(logits.abs().max())


@pytest.mark.parametrize("double", [False, True])
def test_what_bitsandbytes_has_quantised_is_read_here(tmp_path, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    save_model(initial_decoder(SHAPE, seed=4), tmp_path / "plain", tokenizer=None)
    asked = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=transformers.BitsAndBytesConfig(**asked, bnb_4bit_compute_dtype=torch.float32),
    )
    place = tmp_path / "theirs"
    place.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, place / "model.safetensors")
    values = read_json(tmp_path / "plain" / "config.json") | {"quantization_config": {"quant_method": "bitsandbytes", **asked}}
    write_json(place / "config.json", values)
    parts = quantised_parts(load_model(place))
    assert len(parts) == 14 and all(part.scheme == NF4(double) for part in parts.values())
    for name, part in parts.items():
        weight = theirs.get_submodule(f"model.{name}").weight
        torch.testing.assert_close(part.weight, functional.dequantize_4bit(weight.data, weight.quant_state))
