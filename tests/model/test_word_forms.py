"""Folders of AutoAWQ and GPTQ, made here by loops over codes as those packages' sources describe them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bessemer.core.errors import ArtefactError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.quantisation.quantised_layers import is_quantised
from bessemer.model.quantisation.schemes import Int4
from bessemer.model.quantisation.storage import schemes_of
from bessemer.model.storage.folder import load_model, save_model
from tests.model.family_models import make
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

GROUP = 32
#: AutoAWQ's packing: code i of a word is that of column `AWQ_ORDER[i]` of eight.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
SETTINGS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "lm_head": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "checkpoint_format": "gptq_v2"},
}


def word(codes):
    """Eight codes as an int32, the first in the lowest bits."""
    return np.uint32(sum(int(code) << 4 * place for place, code in enumerate(codes))).view(np.int32)


def in_words(codes, order=range(8)):
    """The last dimension's codes in words. order: which of eight columns lies at each place."""
    rows, columns = codes.shape
    made = [[word([row[first + column] for column in order]) for first in range(0, columns, 8)] for row in codes]
    return torch.tensor(np.array(made), dtype=torch.int32).reshape(rows, columns // 8)


def stored(form, codes_NK, zeros_NG, scales_NG):
    """The tensors of a matrix in a form, by their suffix."""
    scales = torch.tensor(scales_NG.T.copy(), dtype=torch.float16)
    if form == "awq":
        return {"qweight": in_words(codes_NK.T, AWQ_ORDER), "qzeros": in_words(zeros_NG.T, AWQ_ORDER), "scales": scales}
    minus = 0 if form == "gptq_v2" else 1
    groups = torch.arange(codes_NK.shape[1], dtype=torch.int32) // GROUP
    zeros = in_words((zeros_NG.T - minus) % 16)
    return {"qweight": in_words(codes_NK).T.contiguous(), "qzeros": zeros, "scales": scales, "g_idx": groups}


def write(folder, form, **changed):
    """A small Llama in a form, and beside it the same with its weights as numbers; the two folders."""
    case = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": VOCAB_SIZE}
    plain, quantised = folder / "plain", folder / form
    make("llama", **case).save_pretrained(plain)
    write_small_tokenizer(plain)
    draw, tensors, numbers = np.random.default_rng(3), {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if "_proj" not in name or changed.get("modules_to_not_convert", "-") in name:
            tensors[name] = numbers[name] = tensor
            continue
        outputs, inputs = tensor.shape
        codes, zeros = draw.integers(0, 16, (outputs, inputs)), draw.integers(0, 16, (outputs, inputs // GROUP))
        scales = draw.uniform(0.005, 0.02, zeros.shape).astype(np.float16)
        values = (codes - zeros.repeat(GROUP, 1)) * scales.astype(np.float32).repeat(GROUP, 1)
        numbers[name] = torch.tensor(values, dtype=torch.float32)
        base = name.removesuffix(".weight")
        tensors |= {f"{base}.{suffix}": one for suffix, one in stored(form, codes, zeros, scales).items()}
    save_file(numbers, plain / "model.safetensors", metadata={"format": "pt"})
    quantised.mkdir()
    for path in plain.iterdir():
        if path.suffix == ".json":
            (quantised / path.name).write_bytes(path.read_bytes())
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    settings = SETTINGS[form] | {name: [value] if name.startswith("modules") else value for name, value in changed.items()}
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": settings}), encoding="utf-8")
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    return plain, quantised


@pytest.mark.parametrize("form", SETTINGS)
def test_the_weights_are_the_files_numbers(form, tmp_path):
    plain, quantised = write(tmp_path, form)
    ours, expected = load_model(quantised), load_model(plain)
    assert is_quantised(ours) and set(schemes_of(ours).values()) == {Int4(GROUP, "code")}
    tokens = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(tokens) - expected(tokens)).abs().max() < 1e-4
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    texts = [
        Engine(folder, device="cpu", config=EngineConfig(cpu_kernels="off", kv_cache_dtype="float32")).generate("the", params)
        for folder in (quantised, plain)
    ]
    assert texts[0][0].token_ids == texts[1][0].token_ids
    save_model(ours, tmp_path / "again", tokenizer=quantised)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "again")(tokens), ours(tokens))
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))["quantization_config"]["quant_method"]
        != form
    )


def test_what_is_left_out_of_awq_is_read_as_it_is(tmp_path):
    plain, quantised = write(tmp_path, "awq", modules_to_not_convert="down_proj")
    ours = load_model(quantised)
    assert not any("down_proj" in name for name in schemes_of(ours))
    down = "layers.1.mlp.down_proj.weight"
    assert torch.equal(ours.state_dict()[down], load_model(plain).state_dict()[down])


@pytest.mark.parametrize(
    ("form", "changed", "reason"),
    [
        ("awq", {"version": "gemv"}, "version gemv"),
        ("awq", {"bits": 3}, "3 bits, and 4 are read"),
        ("awq", {"zero_point": False}, "zero_point: false"),
        ("gptq", {"desc_act": True}, "desc_act"),
        ("gptq", {"bits": 8}, "8 bits, and 4 are read"),
        ("gptq", {"dynamic": {"-:.*down.*": {}}}, "settings by module"),
        ("gptq", {"lm_head": True}, "lm_head: true"),
    ],
)
def test_variants_that_are_not_read_are_refused_by_name(form, changed, reason, tmp_path):
    _, quantised = write(tmp_path, form, **changed)
    with pytest.raises(
        ArtefactError, match=rf"config\.json: the weights are quantised in a way that is not supported: .*{reason}"
    ):
        load_model(quantised)
