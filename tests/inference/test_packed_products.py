"""Quantised models that are not plain: their products by packed codes, in the decoder's own modules."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.cpu_kernels.packed import PackedMatrix
from bessemer.model.cpu_kernels.packed_matmuls import packed_product, packed_products
from bessemer.model.quantisation.base import Codes
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_layers import QuantisedLinear, QuantisedStack, quantised_parts, using_packed_matmuls
from bessemer.model.quantisation.schemes import Int4
from tests.cases import slow_but
from tests.inference.models import ARCHITECTURES, BASE, LINEAR, small_tokenizer
from tests.inference.steps import Steps, by_modules, short_texts
from tests.inference.test_compiled_steps import relative, same
from tests.model.randomised import random_decoder, random_tokens
from tests.model.test_cpu_kernels import quantised_activations

#: Every width a multiple of 64.
WIDE = BASE.with_changes(hidden_size=64, intermediate_size=128, head_dim=16, max_position_embeddings=400)
MODELS = {
    "experts": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "expert_bias": True},
    "latent": ARCHITECTURES["latent"] | {"kv_lora_rank": 64, "q_lora_rank": 64, "v_head_dim": 16},
    "linear": {**LINEAR, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
SCHEMES = {"int8": {"scheme": "int8"}, "int4": {"scheme": "int4", "method": "rtn", "group_size": 32}}


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if library() is None:
        pytest.skip(unavailable())


def quantised_model(name, scheme="int4"):
    decoder = random_decoder(WIDE.with_changes(**MODELS[name]), 0)
    quantise(decoder, QuantizeConfig(**SCHEMES[scheme]))
    return decoder


def packed_steps(decoder, threads=2, **how):
    return Steps(decoder, partial(by_modules, packed=threads), **how)


def with_activations_of_8_bits(decoder):
    """The decoder's own modules, every quantised one of which reads what the kernels read."""
    parts = [part for part in decoder.modules() if isinstance(part, QuantisedLinear) and part is not decoder.head]
    parts += [layer for part in decoder.modules() if isinstance(part, QuantisedStack) for layer in part.matrices]
    for part in parts:
        part.register_forward_pre_hook(lambda module, inputs: (quantised_activations(inputs[0]).float(),))
    decoder.norm.register_forward_hook(lambda module, inputs, normed: quantised_activations(normed).float())


@pytest.mark.parametrize(
    ("name", "scheme"), slow_but({*product(MODELS, ["int4"]), ("experts", "int8")}, product(MODELS, SCHEMES))
)
def test_quantised_weights_meet_activations_of_8_bits_in_every_architecture(name, scheme):
    decoder = quantised_model(name, scheme)
    rows_RT = random_tokens(WIDE, 24, 8)
    found_RTV, exact_RTV = (short_texts(steps(decoder, slots=24), rows_RT) for steps in (packed_steps, Steps))
    with_activations_of_8_bits(decoder)
    expected_RTV = short_texts(Steps(decoder, slots=24), rows_RT)
    errors_RT, moved_RT = relative(found_RTV, expected_RTV), relative(exact_RTV, expected_RTV)
    # bounds as in test_compiled_steps
    assert errors_RT.quantile(0.8) < 1e-6
    # what rounding moves may also be the choice of an expert, by which a row is another
    assert name == "experts" or (errors_RT < 2 * moved_RT).all()
    assert 0.001 < relative(found_RTV, exact_RTV).median() < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_with_activations_of_16_bits_logits_are_those_of_the_decoded_weights(name):
    decoder = quantised_model(name)
    rows_RT = random_tokens(WIDE, 4, 8)
    exact_RTV, *found = (
        short_texts(Steps(decoder, partial(by_modules, **how)), rows_RT)
        for how in ({}, {"packed": 2, "bits": 8}, {"packed": 2, "bits": 16})
    )
    narrow_RT, wide_RT = (relative(found_RTV, exact_RTV) for found_RTV in found)
    assert wide_RT.max() < 2e-3 and wide_RT.median() < narrow_RT.median() / 50


@pytest.mark.parametrize("name", MODELS)
def test_every_quantised_matrix_of_a_model_is_packed(name):
    decoder = quantised_model(name)
    packed_matmuls = packed_products(decoder, 1)
    assert {*packed_matmuls.products, *packed_matmuls.stacks, *packed_matmuls.weights} == set(quantised_parts(decoder).values())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_releases_its_codes_has_them_in_the_products_alone(name):
    decoder, whole = quantised_model(name), quantised_model(name)
    rows = random_tokens(WIDE, 1, 9)
    expected = packed_steps(whole)((0, rows[0], 0, 9))[0]
    steps = Steps(decoder, partial(by_modules, packed=2, release=True))
    assert torch.equal(steps((0, rows[0], 0, 9))[0], expected)
    kept_weights = {*packed_products(whole, 1).weights}
    for place, part in quantised_parts(whole).items():
        released = quantised_parts(decoder)[place]
        # a weight that is used as it is keeps its codes
        assert released.is_released is (part not in kept_weights), place
        assert all(map(same, released.stored.tensors.items(), part.stored.tensors.items())), place
    steps.runner.weights_changed()
    assert torch.equal(steps((0, rows[0], 0, 9))[0], expected)


def test_a_table_that_is_only_looked_up_is_not_packed():
    decoder = random_decoder(WIDE.with_changes(**MODELS["experts"], tie_word_embeddings=False), 0)
    quantise(decoder, QuantizeConfig(**SCHEMES["int4"]))
    assert decoder.embed_tokens not in packed_products(decoder, 1).products


@pytest.mark.parametrize(("tokens", "quantised", "threads"), [(60, True, 1), (70, True, 2), (60, False, 2)])
def test_few_rows_are_left_to_one_of_pytorchs_threads_where_the_kernels_do_the_products(tokens, quantised, threads):
    decoder = quantised_model("experts") if quantised else random_decoder(WIDE.with_changes(**MODELS["experts"]), 0)
    seen = []
    decoder.norm.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    rows, before = random_tokens(WIDE, 1, tokens), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        packed_steps(decoder)((0, rows[0], 0, tokens))
        assert seen == [threads] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_was_lent_is_taken_back():
    decoder = quantised_model("experts")
    packed_matmul = packed_products(decoder, 1)
    with using_packed_matmuls(packed_matmul):
        assert all(part.packed_matmul is not None for part in quantised_parts(decoder).values())
    assert all(part.packed_matmul is None for part in quantised_parts(decoder).values())


def with_offsets(outputs=40, inputs=96):
    generator = torch.Generator().manual_seed(3)
    scheme = Int4(32, "offset")
    codes = torch.randint(0, 256, (outputs, inputs // 2), generator=generator, dtype=torch.uint8)
    scales = torch.rand(outputs, inputs // 32, generator=generator).half().float()
    offsets = torch.randn(outputs, inputs // 32, generator=generator).half().float()
    return QuantisedLinear(inputs, outputs, scheme).take(Codes(scheme, {"codes": codes, "scales": scales, "offsets": offsets}))


def test_a_layer_whose_groups_have_offsets_gives_its_weights_products_and_gives_its_codes_back():
    layer, rows = with_offsets(), torch.randn(7, 96)
    expected = layer(rows)
    product, stored = packed_product(layer, 1), layer.stored
    torch.testing.assert_close(product(rows), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    layer.release(PackedMatrix.of(layer).keeper(layer))
    assert not layer.tensors
    assert all(map(same, layer.stored.tensors.items(), stored.tensors.items()))


@pytest.mark.parametrize("offsets", [False, True])
def test_a_row_of_a_product_has_the_same_bits_in_any_company(offsets):
    part = with_offsets() if offsets else quantised_model("experts").blocks[0].mlp.experts.gate_up_proj.matrices[3]
    product = packed_product(part, 2)
    rows = torch.randn(41, part.in_features)
    together = product(rows)
    for first, last in [(0, 1), (3, 20), (20, 41)]:
        assert torch.equal(product(rows[first:last]), together[first:last])
    assert torch.equal(packed_product(part, 1)(rows), together)


@pytest.mark.parametrize("name", MODELS)
def test_an_invariant_engine_gives_the_same_numbers_alone_and_in_company(name, tmp_path):
    model, tokenizer = quantised_model(name), small_tokenizer(tmp_path)
    config = EngineConfig(batch_invariant=True, cpu_kernels="on", block_size=8)
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    prompts = [list(range(length)) for length in (3, 30, 50)]
    together = Engine(model, tokenizer, config=config).generate(prompts, params)
    assert together == [Engine(model, tokenizer, config=config).generate([prompt], params)[0] for prompt in prompts]


def test_the_engine_packs_where_kernels_are_asked_for_and_reads_weights_where_they_are_off(tmp_path):
    model, tokenizer = quantised_model("experts"), small_tokenizer(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=1)
    numbers = {
        kernels: Engine(model, tokenizer, config=EngineConfig(cpu_kernels=kernels)).generate([[1, 2, 3]], params)[0].log_probs
        for kernels in ("on", "off", "auto")
    }
    assert numbers["on"] != numbers["off"] == numbers["auto"]  # a model in memory is not packed unasked


def test_changed_codes_are_packed_again(tmp_path):
    model, other = quantised_model("experts"), random_decoder(WIDE.with_changes(**MODELS["experts"]), 5)
    quantise(other, QuantizeConfig(**SCHEMES["int4"]))
    tokenizer, config = small_tokenizer(tmp_path), EngineConfig(cpu_kernels="on")
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=1, ignore_eos=True)
    engine = Engine(model, tokenizer, config=config)
    engine.update_weights(other.state_dict())
    assert engine.generate([[1, 2, 3]], params) == Engine(other, tokenizer, config=config).generate([[1, 2, 3]], params)
