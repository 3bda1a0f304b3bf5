"""Products with codes by Triton kernels, run by Triton's interpreter where there is no card."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.linear import TritonCodes
from bessemer.model.quantisation import triton_products
from bessemer.model.quantisation.base import Codes
from bessemer.model.quantisation.blocks import BLOCK_FORMS, GgufBlocks
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.fp8 import Fp8
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_layers import using_packed_matmuls
from bessemer.model.quantisation.schemes import W8A8, Int4, Int8
from bessemer.model.quantisation.triton_products import decoded, gpu_products, gpu_weight, product
from tests.inference.models import ARCHITECTURES, BASE, small_tokenizer
from tests.inference.test_identity import assert_same_but_for_ties
from tests.model.randomised import random_decoder, random_tokens

#: Where there is a card its own kernels are run, beside the other tests of cards.
pytestmark = [pytest.mark.peer(name="triton"), *([pytest.mark.gpu] if torch.cuda.is_available() else [])]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Neither is a multiple of a tile's outputs or inputs; those of blocks are whole blocks.
OUTPUTS, INPUTS, BLOCK_INPUTS = 40, 832, 768


def random_blocks(kind, outputs=OUTPUTS, inputs=BLOCK_INPUTS):
    """Blocks of any bytes whose float16 numbers are finite."""
    form = BLOCK_FORMS[kind]
    generator = np.random.default_rng(1)
    blocks = generator.integers(0, 256, (outputs, inputs // form.values, form.bytes), np.uint8)
    halves = {"Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": ()}.get(kind, (0,))
    for at in halves:
        numbers = generator.normal(0, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = numbers[..., None].view(np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = generator.integers(120, 128, blocks.shape[:2])
    return Codes(GgufBlocks(kind), {"codes": torch.from_numpy(blocks.reshape(outputs, -1)).to(DEVICE)})


def quantised(scheme):
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(2))
    stored = scheme.quantise(weight)
    return Codes(stored.scheme, {name: tensor.to(DEVICE) for name, tensor in stored.tensors.items()})


def offsets():
    """As Q4_1 has them: scale · code + offset."""
    stored = quantised(Int4(32, "code"))
    scales, zeros = stored.tensors["scales"], stored.tensors["zeros"]
    rest = {"scales": scales, "offsets": -scales * zeros}
    return Codes(Int4(32, "offset"), {"codes": stored.tensors["codes"], **rest})


SCHEMES = {
    "int8": lambda: quantised(Int8()),
    "int8 in groups": lambda: quantised(Int8(64)),
    "int4": lambda: quantised(Int4(32)),
    "int4 with zeros": lambda: quantised(Int4(64, "code")),
    "int4 with offsets": offsets,
    "fp8": lambda: quantised(Fp8()),
}
CASES = {**SCHEMES, **{kind: (lambda kind=kind: random_blocks(kind)) for kind in BLOCK_FORMS}}


@pytest.mark.parametrize("name", CASES)
def test_codes_are_decoded_within_a_product_as_their_scheme_decodes_them(name):
    stored = CASES[name]()
    weight = gpu_weight(stored)
    expected_NK = stored.dequantised()
    assert torch.equal(decoded(weight, torch.float32), expected_NK) or torch.allclose(
        decoded(weight, torch.float32), expected_NK, rtol=1e-6, atol=0
    )
    hidden = torch.randn(2, 9, weight.inputs, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    bias_N = torch.linspace(-1, 1, OUTPUTS, device=DEVICE)
    found = product(weight, bias_N, hidden)
    expected = hidden.double() @ expected_NK.double().T + bias_N.double()
    assert found.dtype == hidden.dtype and found.shape == (2, 9, OUTPUTS)
    # a card multiplies float32 in TF32
    assert (found - expected).abs().max() < (1e-5 if DEVICE.type == "cpu" else 1e-2) * expected.abs().max()


def test_many_rows_meet_a_decoded_matrix_and_few_meet_the_codes(monkeypatch):
    weight = gpu_weight(CASES["Q4_K"]())
    hidden = torch.randn(triton_products.FEW_ROWS + 1, BLOCK_INPUTS, device=DEVICE)
    many, few = product(weight, None, hidden), product(weight, None, hidden[:3])
    assert torch.allclose(many[:3], few, atol=(1e-4 if DEVICE.type == "cpu" else 0.05) * float(many.abs().max()))
    monkeypatch.setattr(triton_products, "decoded", None)
    product(weight, None, hidden[:3])
    with pytest.raises(TypeError):
        product(weight, None, hidden)


def test_products_are_in_the_activations_type_and_never_in_float32():
    weight = gpu_weight(CASES["int8"]())
    hidden = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(3)).to(DEVICE, torch.float16)
    expected = hidden.float() @ decoded(weight, torch.float16).float().T
    found = product(weight, None, hidden)
    assert found.dtype == torch.float16 and torch.allclose(found.float(), expected, rtol=2e-3, atol=0.05)
    assert decoded(weight, torch.float16).dtype == torch.float16


def test_what_no_kernel_knows_is_left_to_its_scheme():
    assert gpu_weight(quantised(W8A8())) is None
    assert gpu_weight(quantised(Int4(16))) is None


def test_an_engine_on_them_makes_the_tokens_of_decoded_weights_but_for_ties(tmp_path, monkeypatch):
    model = random_decoder(BASE.with_changes(hidden_size=64, head_dim=16, intermediate_size=96))
    quantise(model, QuantizeConfig(scheme="int4", group_size=32))
    model, tokenizer = model.to(DEVICE), small_tokenizer(tmp_path)
    settings = EngineConfig(cpu_kernels="off", kv_cache_dtype="float32", paged_attention="gather")
    params, prompts = SamplingParams(max_tokens=4, temperature=0, logprobs=2), [[7, 8, 9]]
    monkeypatch.setattr(TritonCodes, "supports", staticmethod(lambda model: False))
    expected = Engine(model, tokenizer, config=settings).generate(prompts, params)
    monkeypatch.setattr(TritonCodes, "supports", staticmethod(lambda model: True))
    engine = Engine(model, tokenizer, config=settings)
    assert "codes multiplied by Triton kernels" in engine.arithmetic
    assert_same_but_for_ties(engine.generate(prompts, params)[0], expected[0])


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param("Q4_K,int8", id="two"),
        pytest.param(
            "fp8,int4,int4 code,int4 offset,Q5_0,Q5_1,Q5_K,Q6_K,IQ4_NL,IQ4_XS,MXFP4", id="all", marks=pytest.mark.slow
        ),
    ],
)
def test_kernels_are_compiled_for_cards_that_are_not_here(kinds):
    if DEVICE.type == "cuda":
        pytest.skip("they are compiled for this card")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-m", "tests.model.triton_compile", kinds]
    done = subprocess.run(run, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout.splitlines()[-1])
    # for Ampere and Hopper, with products on tensor cores, within the shared memory of a multiprocessor
    assert {each["card"] for each in compiled} == {80, 90} and all(each["shared"] < 99 << 10 for each in compiled)
    assert all(each["tensor_cores"] for each in compiled if each["kernel"] == "_product_kernel")


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_a_models_logits_are_those_of_its_modules(name):
    changes = ARCHITECTURES[name] | ({"moe_intermediate_size": 32, "expert_bias": True} if name == "experts" else {})
    model = random_decoder(BASE.with_changes(hidden_size=64, head_dim=16, intermediate_size=96, **changes)).to(DEVICE)
    quantise(model, QuantizeConfig(scheme="int8"))
    tokens_BT = random_tokens(model.config, 1, 11).to(DEVICE)
    matmuls, unknown = gpu_products(model)
    assert matmuls.products and bool(matmuls.grouped) == (name == "experts") and not unknown
    with torch.no_grad():
        expected = model(tokens_BT)
        with using_packed_matmuls(matmuls):
            found = model(tokens_BT)
    assert (found - expected).abs().max() < (1e-4 if DEVICE.type == "cpu" else 0.05)
