"""Folders with floats of 4 bits and of bitsandbytes' 8 bits, made here by their formulas."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bessemer.core.errors import ArtefactError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.quantisation.blocks import GgufBlocks
from bessemer.model.quantisation.fp4 import Nvfp4
from bessemer.model.quantisation.schemes import Int8
from bessemer.model.quantisation.storage import schemes_of
from bessemer.model.storage.folder import load_model, save_model
from tests.model.family_models import make
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FLOATS = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
#: A group of compressed-tensors, and how its activations are meant.
GROUPS = {
    "nvfp4": FLOATS | {"strategy": "tensor_group", "group_size": 16},
    "mxfp4": FLOATS | {"strategy": "group", "group_size": 32},
}


def compressed(form):
    activations = {"num_bits": 4, "type": "float", "dynamic": "local", "group_size": 16} if form == "nvfp4" else None
    group = {
        "targets": ["Linear"],
        "weights": GROUPS[form],
        "input_activations": activations,
        "format": f"{form}-pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{form}-pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


SETTINGS = {
    "nvfp4": compressed("nvfp4"),
    "mxfp4": compressed("mxfp4"),
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_skip_modules": ["lm_head"]},
}


def four_bits(draw, outputs, inputs):
    """Codes, two neighbours a byte and the first low, and their numbers."""
    codes = draw.integers(0, 16, (outputs, inputs))
    return torch.tensor(codes[:, 0::2] | codes[:, 1::2] << 4, dtype=torch.uint8), NUMBERS[codes]


def stored(form, draw, outputs, inputs):
    """The tensors of a matrix in a form, by their suffix, and its weights."""
    if form == "int8":
        codes = draw.integers(-127, 128, (outputs, inputs)).astype(np.int8)
        largest = draw.uniform(0.1, 0.5, outputs).astype(np.float32)
        weight = codes * (largest / np.float32(127))[:, None]
        found = {
            "weight": torch.tensor(codes),
            "SCB": torch.tensor(largest),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return found, weight
    packed, numbers = four_bits(draw, outputs, inputs)
    if form == "mxfp4":
        exponents = draw.integers(120, 126, (outputs, inputs // 32)).astype(np.uint8)
        scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
        return {"weight_packed": packed, "weight_scale": torch.tensor(exponents)}, numbers * scales.repeat(32, 1)
    scales, divisor = torch.rand(outputs, inputs // 16).to(torch.float8_e4m3fn), torch.tensor([draw.uniform(20, 40)]).float()
    found = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": divisor}
    found["input_global_scale"] = torch.tensor([1.0])
    return found, numbers * (scales.float() / divisor).numpy().repeat(16, 1)


def write(folder, form, family="llama"):
    """A small model in a form, and beside it the same with its weights as numbers; the two folders."""
    plain, quantised = folder / "plain", folder / form
    make(family, hidden_size=64, intermediate_size=96, vocab_size=VOCAB_SIZE).save_pretrained(plain)
    write_small_tokenizer(plain)
    draw, tensors, numbers = np.random.default_rng(3), {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = numbers[name] = tensor
            continue
        found, weight = stored(form, draw, *tensor.shape)
        numbers[name] = torch.tensor(weight)
        tensors |= {f"{name.removesuffix('.weight')}.{suffix}": one for suffix, one in found.items()}
    return finished(plain, quantised, numbers, tensors, SETTINGS[form])


def finished(plain, quantised, numbers, tensors, settings):
    save_file(numbers, plain / "model.safetensors", metadata={"format": "pt"})
    quantised.mkdir()
    for path in plain.iterdir():
        if path.suffix == ".json":
            (quantised / path.name).write_bytes(path.read_bytes())
    config = json.loads((plain / "config.json").read_text(encoding="utf-8")) | {"quantization_config": settings}
    (quantised / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    return plain, quantised


def logits(model):
    tokens = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens)


@pytest.mark.parametrize(
    ("form", "scheme"), [("nvfp4", Nvfp4()), ("mxfp4", GgufBlocks("MXFP4")), ("int8", Int8())], ids=["nvfp4", "mxfp4", "int8"]
)
def test_the_weights_are_the_files_numbers(form, scheme, tmp_path):
    plain, quantised = write(tmp_path, form)
    ours, expected = load_model(quantised), load_model(plain)
    assert set(schemes_of(ours).values()) == {scheme}
    for block, other in zip(ours.layers, expected.layers, strict=True):
        assert torch.equal(block.self_attn.k_proj.weight, other.self_attn.k_proj.weight)
        assert torch.equal(block.mlp.down_proj.weight, other.mlp.down_proj.weight)
    assert (logits(ours) - logits(expected)).abs().max() < 1e-4
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    config = EngineConfig(cpu_kernels="off", kv_cache_dtype="float32")
    texts = [Engine(folder, device="cpu", config=config).generate("the", params) for folder in (quantised, plain)]
    assert texts[0][0].token_ids == texts[1][0].token_ids
    save_model(ours, tmp_path / "again", tokenizer=quantised)
    # a scale of LLM.int8 is no float16, which the form has that is written
    again = logits(load_model(tmp_path / "again"))
    assert torch.equal(again, logits(ours)) if form != "int8" else (again - logits(ours)).abs().max() < 1e-2
    settings = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_compressed_tensors_decodes_the_same_numbers(form, tmp_path):
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    assert library
    draw = np.random.default_rng(5)
    found, weight = stored(form, draw, 24, 64)
    numbers = unpack_fp4_from_uint8(found["weight_packed"], 24, 64, dtype=torch.float32)
    scales = found["weight_scale"].float() if form == "nvfp4" else torch.exp2(found["weight_scale"].float() - 127)
    args = library.quantization.QuantizationArgs(**GROUPS[form])
    theirs = dequantize(numbers, scales, args=args, global_scale=found.get("weight_global_scale"), dtype=torch.float32)
    assert torch.equal(theirs, torch.tensor(weight))


def gpt_oss(folder):
    """A small gpt-oss with its experts in MXFP4, as it is published, and the same as numbers; the two folders."""
    plain, quantised = folder / "plain", folder / "mxfp4"
    make("gpt_oss", hidden_size=64, intermediate_size=96, vocab_size=VOCAB_SIZE).save_pretrained(plain)
    write_small_tokenizer(plain)
    generator, tensors, numbers = torch.Generator().manual_seed(3), {}, {}
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = numbers[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers[name] = convert(blocks, scales, dtype=torch.float32).contiguous()
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return finished(plain, quantised, numbers, tensors, settings)


def test_the_experts_of_gpt_oss_are_those_that_transformers_decodes(tmp_path):
    plain, quantised = gpt_oss(tmp_path)
    ours, expected = load_model(quantised), load_model(plain)
    assert {name.rpartition(".")[2] for name in schemes_of(ours)} == {"gate_up_proj", "down_proj"}
    assert set(schemes_of(ours).values()) == {GgufBlocks("MXFP4")}
    assert (logits(ours) - logits(expected)).abs().max() < 1e-4
    save_model(ours, tmp_path / "again", tokenizer=quantised)
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(ours))


def test_mxfp4_of_other_matrices_than_experts_is_refused(tmp_path):
    plain, quantised = write(tmp_path, "mxfp4", "mixtral")
    config = json.loads((quantised / "config.json").read_text(encoding="utf-8"))
    (quantised / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}), encoding="utf-8"
    )
    with pytest.raises(ArtefactError, match="read of gpt-oss's experts alone"):
        load_model(quantised)
    assert plain


@pytest.mark.parametrize("outputs", [1, 48])
def test_weights_rounded_to_nvfp4_are_near(outputs):
    weight = torch.randn(outputs, 64, generator=torch.Generator().manual_seed(2))
    most = weight.unflatten(-1, (-1, 16)).abs().amax(-1).repeat_interleave(16, -1)
    # numbers lie a third of the largest apart at most, and a scale is e4m3
    assert ((Nvfp4().quantise(weight).dequantised() - weight).abs() <= most * (1 / 6 + 1 / 16)).all()
