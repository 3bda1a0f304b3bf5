"""Quantised models whose weights are read out of their codes once, where no kernels multiply by them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.execution import linear
from bessemer.inference.execution.compiled_steps import CompiledSteps
from bessemer.model import cpu_kernels as build
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.cpu_kernels import packed_matmuls as choice
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.quantisation import schemes
from bessemer.model.quantisation.blocks import BLOCK_FORMS, GgufBlocks
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.fp4 import Nvfp4
from bessemer.model.quantisation.fp8 import Fp8
from bessemer.model.quantisation.nf4 import NF4
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_decoder import (
    decoded_bytes,
    decoded_products,
    dequantised,
    product,
    quantisable,
    replace_with_quantised_modules,
)
from bessemer.model.quantisation.quantised_layers import quantised_parts
from bessemer.model.quantisation.schemes import Int4, Int8
from bessemer.model.storage.folder import save_model
from tests.cases import slow_but
from tests.inference.models import ARCHITECTURES, BASE, small_tokenizer
from tests.inference.steps import Steps, by_modules
from tests.model.randomised import random_decoder, random_tokens

WIDE = BASE.with_changes(hidden_size=64, intermediate_size=128, head_dim=16)
SCHEMES = {"int8": {"scheme": "int8"}, "int4": {"scheme": "int4", "group_size": 32}, "w8a8": {"scheme": "w8a8"}}
MODELS = {
    "dense": {},
    "experts": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "expert_bias": True},
    "latent": ARCHITECTURES["latent"] | {"kv_lora_rank": 64, "q_lora_rank": 64, "v_head_dim": 16},
}


def quantised_model(name="dense", scheme="int8", seed=0, **changes):
    decoder = random_decoder(WIDE.with_changes(**MODELS[name], **changes), seed)
    quantise(decoder, QuantizeConfig(**SCHEMES[scheme]))
    return decoder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("name", "scheme"), [("dense", "int8"), ("experts", "int4"), ("latent", "int8"), ("dense", "w8a8")])
def test_weights_read_out_once_give_what_those_read_out_each_time_give(name, scheme, tied):
    decoder = quantised_model(name, scheme, tie_word_embeddings=tied)
    rows = random_tokens(WIDE, 1, 20)
    pieces = [(0, rows[0], 0, 19), (0, rows[0], 19, 20)]
    found = {
        dtype: torch.cat([Steps(decoder, partial(by_modules, decoded=dtype))(piece)[0] for piece in pieces[:1]])
        for dtype in (None, torch.float16, torch.float32)
    }
    close = partial(torch.testing.assert_close, rtol=0)
    close(found[torch.float32], found[None], atol=1e-5 * found[None].abs().max().item())
    close(found[torch.float16], found[None], atol=2e-3 * found[None].abs().max().item())


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_a_single_row_of_any_size_meets_half_precision_within_its_range(size):
    weight, bias = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), torch.ones(48)
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)) * size
    expected = row.double() @ weight.double().T + bias
    found = product(weight.half(), bias, row)
    assert (found.double() - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert not product(weight.half(), bias, torch.full((1, 64), float("nan"))).isfinite().any()


@pytest.fixture
def folder(tmp_path):
    """A quantised model with a tokenizer."""
    small_tokenizer(tmp_path)
    save_model(quantised_model(), tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    return tmp_path / "model"


def runner_of(folder, **config):
    engine = Engine(folder, device="cpu", config=EngineConfig(threads=1, **config))
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    return engine.core.runner


@pytest.fixture
def measured():
    """What was measured is forgotten before and after."""
    choice.faster_dtype.cache_clear()
    yield
    choice.faster_dtype.cache_clear()


def test_an_engine_without_kernels_reads_weights_out_once_where_memory_holds_them(folder, measured, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        patch.setattr(build.prebuilt, "installed", lambda: None)
        build._outcome.cache_clear()
        runner = runner_of(folder, kv_memory=0.01)
        assert runner.backend.linear.matmuls.products
        assert f"quantised weights read out of their codes once ({str(runner.backend.linear.dtype)[6:]}, " in runner.arithmetic
        patch.setattr(linear, "free_memory_bytes", lambda: 1000)
        assert not runner_of(folder, kv_memory=0.01).backend.linear.matmuls.products
        assert "slow: every product reads weights out of their codes" in capsys.readouterr().err
    build._outcome.cache_clear()


@pytest.fixture
def no_kernels(measured, monkeypatch):
    """No compiled kernels on this machine."""
    with monkeypatch.context() as patch:
        patch.setenv(build.ARITHMETIC_VARIABLE, "none")
        build._outcome.cache_clear()
        yield
    build._outcome.cache_clear()


def test_where_memory_holds_half_precision_alone_weights_are_read_out_to_it(folder, no_kernels, monkeypatch):
    monkeypatch.setattr(linear, "faster_dtype", lambda: torch.float32)
    wide = decoded_bytes(quantised_model(), torch.float32)
    monkeypatch.setattr(linear, "_holds", lambda model, needed: needed < wide)
    assert runner_of(folder, kv_memory=0.01).backend.linear.dtype == torch.float16


#: Of each way to keep codes, one.
ONCE = {"int8": lambda: Int8(32), "int4": lambda: Int4(32), "fp8": lambda: Fp8(16), "nf4": NF4, "nvfp4": Nvfp4}


@pytest.mark.parametrize("kind", slow_but(["int8", "nf4", "Q4_K"], [*ONCE, "Q4_K", "Q6_K", "IQ4_NL", "MXFP4"]))
def test_without_kernels_no_product_reads_weights_out_of_their_codes(kind, no_kernels, tmp_path, monkeypatch):
    small_tokenizer(tmp_path)
    model = blocks_model(kind) if kind in BLOCK_FORMS else coded_model(ONCE[kind]())
    save_model(model, tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    engine = Engine(tmp_path / "model", device="cpu", config=EngineConfig(threads=1, kv_memory=0.01))
    assert library() is None and "quantised weights read out of their codes once" in engine.arithmetic
    count = decodings(engine.model, monkeypatch)
    engine.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=3))
    assert not count


def test_kernels_of_plain_cpp_are_left_where_pytorch_is_faster(folder, measured, monkeypatch):
    if library() is None:
        pytest.skip(unavailable())
    monkeypatch.setattr(choice, "arithmetic", lambda: "portable")
    monkeypatch.setattr(choice, "_SIZE", 64)
    for seconds, kind in (([1.0, 3.0, 2.0], type(None)), ([2.0, 3.0, 1.0], CompiledSteps)):
        taken = iter(seconds)
        monkeypatch.setattr(choice, "_seconds", lambda compute, taken=taken: compute() is not None and next(taken))
        choice.faster_dtype.cache_clear()
        runner = runner_of(folder)
        assert isinstance(runner.backend.whole, kind)
    monkeypatch.undo()
    choice.faster_dtype.cache_clear()
    assert "read out of their codes once (float32, " in runner_of(folder, cpu_kernels="off").arithmetic


def blocks_model(kind):
    """A model with blocks of a GGUF file, all zero, as wide as the blocks of K types."""
    decoder = random_decoder(BASE.with_changes(hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1), 0)
    names = [name for name, _ in quantisable(decoder)]
    return replace_with_quantised_modules(decoder, dict.fromkeys(names, GgufBlocks(kind)))


def coded_model(scheme):
    """A model in bfloat16 whose blocks are of one scheme."""
    decoder = random_decoder(WIDE, 0).to(torch.bfloat16)
    weights = {name: decoder.get_submodule(name).weight.detach() for name, _ in quantisable(decoder)}
    replace_with_quantised_modules(decoder, dict.fromkeys(weights, scheme))
    for name, weight in weights.items():
        decoder.get_submodule(name).take(scheme.quantise(weight))
    return decoder


def decodings(model, monkeypatch):
    """Counts how often weights of a model's schemes are decoded from now on."""
    count = []
    for kind in {type(part.scheme) for part in quantised_parts(model).values()}:
        decode = kind.dequantise
        monkeypatch.setattr(kind, "dequantise", lambda self, tensors, of=decode: count.append(1) or of(self, tensors))
    return count


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("scheme", ["fp8", "nf4"])
def test_codes_that_no_kernel_knows_are_decoded_once_and_come_back_bit_for_bit(scheme, kernels, tmp_path, monkeypatch):
    if library() is None:
        pytest.skip(unavailable())
    model = coded_model({"fp8": Fp8(16), "nf4": NF4()}[scheme])
    tokenizer = small_tokenizer(tmp_path)
    save_model(model, tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    prompt, params = random_tokens(WIDE, 1, 40)[0].tolist(), SamplingParams(max_tokens=2, prompt_logprobs=0)
    config = EngineConfig(threads=1, kv_cache_dtype="float32")
    exact = Engine(dequantised(model).float(), tokenizer, config=config).generate([prompt], params)[0].prompt_log_probs
    engine = Engine(tmp_path / "model", device="cpu", config=config.with_changes(cpu_kernels=kernels))
    count = decodings(engine.model, monkeypatch)
    found = engine.generate([prompt], params)[0].prompt_log_probs
    assert not count
    assert max(abs(one.log_probs.token - other.log_probs.token) for one, other in zip(found, exact, strict=True)) < 0.1
    told = f"codes of {scheme} read out once (bfloat16, " if kernels == "auto" else "read out of their codes once (bfloat16, "
    assert told in engine.arithmetic and "activations of 8 bits" not in engine.arithmetic
    for name, part in quantised_parts(model).items():
        own = quantised_parts(engine.model)[name]
        assert own.is_released is (kernels == "auto")
        assert all(torch.equal(own.stored.tensors[key].float(), tensor.float()) for key, tensor in part.stored.tensors.items())


def test_e4m3_in_blocks_of_128_is_multiplied_from_its_codes(tmp_path, monkeypatch):
    if library() is None:
        pytest.skip(unavailable())
    model, tokenizer = coded_model(Fp8(128)), small_tokenizer(tmp_path)
    save_model(model, tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    prompt, params = random_tokens(WIDE, 1, 40)[0].tolist(), SamplingParams(max_tokens=2, prompt_logprobs=0)
    config = EngineConfig(threads=1, kv_cache_dtype="float32")
    exact = Engine(dequantised(model.float()), tokenizer, config=config).generate([prompt], params)[0].prompt_log_probs
    engine = Engine(tmp_path / "model", device="cpu", config=config)
    count = decodings(engine.model, monkeypatch)
    found = engine.generate([prompt], params)[0].prompt_log_probs
    # no weight is rounded, as it would be to bfloat16
    assert max(abs(one.log_probs.token - other.log_probs.token) for one, other in zip(found, exact, strict=True)) < 1e-4
    assert not count and "read out" not in engine.arithmetic and "activations" not in engine.arithmetic
    for name, part in quantised_parts(model).items():
        own = quantised_parts(engine.model)[name]
        assert own.is_released and not own.tensors
        assert all(torch.equal(own.stored.tensors[key].float(), tensor.float()) for key, tensor in part.stored.tensors.items())


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_codes_that_opening_left_in_a_gguf_file_are_packed_or_read_before_the_first_step(kernels, tmp_path, monkeypatch):
    if library() is None:
        pytest.skip(unavailable())
    model = coded_model(Int8(32))
    save_model(model, tmp_path / "model", tokenizer=small_tokenizer(tmp_path).folder)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    engine = Engine(tmp_path / "model.gguf", device="cpu", config=EngineConfig(threads=1, cpu_kernels=kernels))
    parts = quantised_parts(engine.model)
    assert parts and not any(part.deferred is not None for part in parts.values())
    assert {part.is_released for part in parts.values()} == {kernels == "on"}
    for name, part in quantised_parts(model).items():
        assert all(torch.equal(parts[name].stored.tensors[key], tensor) for key, tensor in part.stored.tensors.items())


def test_codes_for_activations_of_8_bits_are_widened_once_where_pytorch_has_no_exact_product(folder, monkeypatch):
    model = quantised_model(scheme="w8a8")
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    layer = model.blocks[0].mlp.up_proj
    expected = layer(hidden)
    monkeypatch.setattr(schemes, "_int_mm_is_exact", lambda: True)
    assert layer not in decoded_products(model, None).products
    monkeypatch.setattr(schemes, "_int_mm_is_exact", lambda: False)
    assert torch.equal(decoded_products(model, None).products[layer](hidden), expected)


def test_codes_that_an_opened_model_gave_up_are_packed_once(folder, monkeypatch):
    if library() is None:
        pytest.skip(unavailable())
    engine, params = (
        Engine(folder, device="cpu", config=EngineConfig(threads=1, cpu_kernels="on")),
        SamplingParams(max_tokens=2),
    )
    packed = []
    monkeypatch.setattr(engine.core.runner, "weights_changed", lambda: packed.append(1))
    for _ in range(2):
        engine.generate([[1, 2, 3]], params)
    assert not packed and all(part.is_released for part in quantised_parts(engine.model).values())
    engine.update_weights(quantised_model(seed=5).state_dict())
    assert packed == [1]


def test_weights_of_an_opened_model_that_gave_up_its_codes_can_be_replaced(folder):
    if library() is None:
        pytest.skip(unavailable())
    other, params = quantised_model(seed=5), SamplingParams(temperature=0, max_tokens=5, logprobs=1)
    config = EngineConfig(threads=1, cpu_kernels="on")
    engine = Engine(folder, device="cpu", config=config)
    before = engine.generate([[1, 2, 3]], params)
    engine.update_weights(other.state_dict())
    found = engine.generate([[1, 2, 3]], params)
    assert found != before and found == Engine(other, engine.tokenizer, config=config).generate([[1, 2, 3]], params)
