"""Folders of 8 bits in floating point, as DeepSeek and Qwen publish them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bessemer.core.errors import ArtefactError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.quantisation.fp8 import Fp8
from bessemer.model.quantisation.storage import schemes_of
from bessemer.model.storage.folder import load_model, save_model
from tests.model.family_models import make
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

BLOCK = 16
SETTINGS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["model.layers.0.mlp.down_proj", "lm_head"],
}


def write(folder, case="qwen3", **changed):
    """A small model of a family in this form, whose matrices are no whole blocks, and the same as numbers; the two folders."""
    plain, quantised = folder / "plain", folder / "fp8"
    make(case, hidden_size=40, vocab_size=VOCAB_SIZE).save_pretrained(plain)
    write_small_tokenizer(plain)
    tensors, numbers, generator = {}, {}, torch.Generator().manual_seed(3)
    for name, tensor in load_file(plain / "model.safetensors").items():
        kept = [f"{one}." for one in SETTINGS["modules_to_not_convert"]]
        if not name.endswith("_proj.weight") or name.startswith(tuple(kept)):
            tensors[name] = numbers[name] = tensor
            continue
        codes = torch.randn(tensor.shape, generator=generator).to(torch.float8_e4m3fn)
        outputs, inputs = (-(-size // BLOCK) for size in tensor.shape)
        scales = torch.rand(outputs, inputs, generator=generator) * 0.1 + 0.01
        numbers[name] = torch.empty(tensor.shape)
        for row in range(outputs):
            for column in range(inputs):
                block = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
                numbers[name][block] = codes[block].float() * scales[row, column]
        tensors |= {name: codes, f"{name}_scale_inv": scales}
    save_file(numbers, plain / "model.safetensors", metadata={"format": "pt"})
    quantised.mkdir()
    for path in plain.iterdir():
        if path.suffix == ".json":
            (quantised / path.name).write_bytes(path.read_bytes())
    config = json.loads((plain / "config.json").read_text(encoding="utf-8")) | {"quantization_config": SETTINGS | changed}
    (quantised / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    return plain, quantised


@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe"])
def test_the_weights_are_the_files_numbers(case, tmp_path):
    plain, quantised = write(tmp_path, case)
    ours, expected = load_model(quantised), load_model(plain)
    assert set(schemes_of(ours).values()) == {Fp8(BLOCK)}
    tokens = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = ours(tokens)
        assert (logits - expected(tokens)).abs().max() < 1e-4
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    made = [
        Engine(folder, device="cpu", config=EngineConfig(kv_cache_dtype="float32")).generate("the", params)[0].token_ids
        for folder in (quantised, plain)
    ]
    assert made[0] == made[1]
    save_model(ours, tmp_path / "again", tokenizer=quantised)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "again")(tokens), logits)


@pytest.mark.parametrize("block", [None, [BLOCK], [BLOCK, 2 * BLOCK], "16"])
def test_other_blocks_are_refused(block, tmp_path):
    _, quantised = write(tmp_path, weight_block_size=block)
    with pytest.raises(ArtefactError, match=r"config\.json: .* fp8 with weight_block_size .*, and square blocks are read"):
        load_model(quantised)


def test_weights_that_are_rounded_are_near(tmp_path):
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(2))
    codes = Fp8(BLOCK).quantise(weight)
    blocks = weight.abs().max()
    assert (codes.dequantised() - weight).abs().max() <= blocks / 448 * 32 / 2
