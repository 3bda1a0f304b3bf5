"""Whole batches through a plain decoder in C++, beside the decoder's own modules."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from bessemer.core.config import setting
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.compiled_steps import CompiledSteps
from bessemer.inference.execution.kv_cache import PagedMemory
from bessemer.model import cpu_kernels as builds
from bessemer.model.config import ModelConfig
from bessemer.model.cpu_kernels import kernels_arithmetic, plain_decoder
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_layers import QuantisedLinear, quantised_parts
from bessemer.model.quantisation.schemes import Int4
from tests.inference.models import BASE, WINDOWS, small_decoder
from tests.inference.steps import Steps, by_kernels, by_modules, mixed_steps, short_texts
from tests.model.randomised import SHAPES, random_decoder, random_tokens
from tests.model.test_cpu_kernels import quantised_activations

LONG = BASE.with_changes(max_position_embeddings=400)
VARIANTS = {
    **SHAPES,
    "windows": BASE.with_changes(**WINDOWS, sliding_window=20),
    "only windows": BASE.with_changes(layer_types=("sliding_attention",) * 2, sliding_window=20),
    "sinks and caps": BASE.with_changes(attention_sinks=True, attn_logit_softcapping=20.0, qk_norm="none"),
    "gemma": BASE.with_changes(
        **WINDOWS,
        sliding_window=20,
        rope_local_base_freq=1000.0,
        norm_offset=True,
        norm_position="both",
        hidden_act="gelu_pytorch_tanh",
        embedding_multiplier=6.9,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=5.0,
        query_pre_attn_scalar=24.0,
    ),
    "granite": BASE.with_changes(
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=8.0,
        query_pre_attn_scalar=64.0**2,
        norm_position="both",
        tie_word_embeddings=False,
    ),
    "layer norm, biases, no gate": BASE.with_changes(
        norm_type="layer",
        gated_mlp=False,
        hidden_act="gelu",
        mlp_bias=True,
        attention_bias=True,
        attention_output_bias=True,
    ),
    "norms after, over all heads": BASE.with_changes(norm_position="after", qk_norm="full", tie_word_embeddings=False),
    "part of each head turned, in neighbours": BASE.with_changes(partial_rotary_factor=0.5, rope_interleave=True),
    "relu": BASE.with_changes(hidden_act="relu"),
    "no positions": BASE.with_changes(position_type="none"),
    "positions in some layers": BASE.with_changes(no_rope_layers=(1, 0)),
    "yarn": BASE.with_changes(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
}
OTHERS = {
    "experts": "it has experts",
    "latent": "it has latent attention",
    "linear": "it has linear attention",
    "alibi": "its positions are alibi",
    "learned positions": "its positions are learned",
}


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if builds.library() is None:
        assert "no C++ compiler" in builds.unavailable()
        pytest.skip(builds.unavailable())


def kernel_steps(decoder, threads=2, **how):
    return Steps(decoder, partial(by_kernels, threads=threads), **how)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_the_decoders(config):
    decoder = random_decoder(config)
    rows = random_tokens(config, 3, 60)
    with torch.no_grad():
        for text, logits in mixed_steps(kernel_steps(decoder), rows).items():
            expected = decoder(rows[text : text + 1, : len(logits)])[0]
            assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_long_prompt_read_at_once_has_the_decoders_logits():
    decoder = random_decoder(LONG)
    rows = random_tokens(LONG, 1, 390)
    logits = kernel_steps(decoder)((0, rows[0], 0, 390))[0]
    with torch.no_grad():
        expected = decoder(rows)[0]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("config", [LONG, LONG.with_changes(**WINDOWS, sliding_window=150)], ids=["all", "windows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_a_row_has_the_same_bits_however_its_text_is_cut_and_in_any_company(config, dtype):
    decoder = random_decoder(config).to(dtype)
    rows = random_tokens(config, 3, 300)
    whole = kernel_steps(decoder)((0, rows[0], 0, 300))[0]
    steps, seen = kernel_steps(decoder, threads=1), []
    steps((1, rows[1], 0, 40))
    for start, end in [(0, 1), (1, 90), (90, 91), (91, 160), (160, 299), (299, 300)]:
        seen.append(steps((1, rows[1], 40 + start % 7, 41 + start % 7), (0, rows[0], start, end), (2, rows[2], start, end))[1])
    assert torch.equal(torch.cat(seen), whole)


SCHEMES = {
    "int8": QuantizeConfig(scheme="int8"),
    "int4": QuantizeConfig(scheme="int4", group_size=32),
    "int4 with zeros": QuantizeConfig(scheme="int4", group_size=64, symmetric=False),
    "int4 throughout": QuantizeConfig(scheme="int4", group_size=32, head="int4"),
    "matrices alone": QuantizeConfig(scheme="int8", head="none"),
}
WIDE = LONG.with_changes(hidden_size=64, intermediate_size=96, head_dim=16)


def quantised_decoder(scheme, **changes):
    decoder = random_decoder(WIDE.with_changes(**changes))
    quantise(decoder, SCHEMES[scheme])
    return decoder


def with_activations_of_8_bits(decoder):
    """The decoder's own modules, every quantised one of which reads what the kernels read."""
    for block in decoder.blocks:
        for part in block.modules():
            if isinstance(part, QuantisedLinear):
                part.register_forward_pre_hook(lambda module, inputs: (quantised_activations(inputs[0]).float(),))
    if isinstance(decoder.head, QuantisedLinear):
        decoder.norm.register_forward_hook(lambda module, inputs, normed: quantised_activations(normed).float())
    return decoder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_packed_product_is_the_integer_sums_to_rounding(scheme):
    decoder = quantised_decoder(scheme, tie_word_embeddings=False)
    products = kernel_steps(decoder).runner.backend.linear.matmuls.products
    quantised = {part for part in decoder.modules() if isinstance(part, QuantisedLinear)}
    assert products.keys() == quantised - {decoder.embed_tokens}  # of which rows are read, and which multiplies nothing
    for layer, product in products.items():
        x_MK = torch.randn(13, layer.in_features, generator=torch.Generator().manual_seed(1))
        x_MGk = quantised_activations(x_MK).unflatten(-1, (-1, 32))
        terms_MNG = torch.einsum("mgk,ngk->mng", x_MGk, layer.weight.double().unflatten(-1, (-1, 32)))
        # The sums within a group are integers, and exact. Rounded to 24 bits are, for each group, its product with the scale
        # of the activations and the total that it is added to; in the end, the row's own scale and a bias. None of these
        # numbers exceeds the sum of all groups' magnitudes.
        roundings = 2 * terms_MNG.shape[-1] + 2
        bound_MN = roundings * 2**-24 * terms_MNG.abs().sum(-1)
        assert ((product(x_MK).double() - terms_MNG.sum(-1)).abs() <= bound_MN).all()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_weights_meet_activations_of_8_bits(scheme, tied):
    decoder = quantised_decoder(scheme, tie_word_embeddings=tied)
    rows_RT = random_tokens(WIDE, 24, 8)
    found_RTV = short_texts(kernel_steps(decoder), rows_RT)
    with torch.no_grad():
        exact_RTV = decoder(rows_RT)
        expected_RTV = with_activations_of_8_bits(decoder)(rows_RT)
    errors_RT, moved_RT = relative(found_RTV, expected_RTV), relative(exact_RTV, expected_RTV)
    # An activation half-way between two codes goes to one or the other by the last bit of the norm before it: in about one row
    # of a hundred, whose change the rows after it in its text attend to. All other rows agree to rounding.
    assert errors_RT.quantile(0.8) < 1e-6
    # Rounding moves an activation by half a step at most, and to the other of two codes by one: no row errs by more than twice
    # what rounding itself moves it.
    assert (errors_RT < 2 * moved_RT).all()


@pytest.mark.parametrize("scheme", ["int8", "int4 with zeros"])
def test_with_activations_of_16_bits_logits_are_those_of_the_decoded_weights(scheme):
    decoder = quantised_decoder(scheme)
    rows_RT = random_tokens(WIDE, 24, 8)
    with torch.no_grad():
        expected_RTV = decoder(rows_RT)
    for make_runner in (partial(by_kernels, threads=2), partial(by_modules, packed=2)):
        narrow_RT, wide_RT = (
            relative(short_texts(Steps(decoder, partial(make_runner, bits=bits)), rows_RT), expected_RTV) for bits in (8, 16)
        )
        assert wide_RT.max() < 1e-3 and wide_RT.median() < narrow_RT.median() / 50


def test_groups_with_an_offset_as_llama_cpps_q4_1_has_are_computed_by_the_step():
    decoder = quantised_decoder("int4 with zeros")
    for part in quantised_parts(decoder).values():
        if part.scheme.zero == "code":
            scheme = Int4(part.scheme.group_size, "offset")
            offsets = (-part.scales * part.zeros).half().float()
            part.scheme = scheme
            del part.zeros
            part.register_buffer("offsets", offsets)
    assert CompiledSteps.supports(decoder) is None
    rows_RT = random_tokens(WIDE, 24, 8)
    found_RTV = short_texts(kernel_steps(decoder), rows_RT)
    with torch.no_grad():
        expected_RTV = with_activations_of_8_bits(decoder)(rows_RT)
    assert relative(found_RTV, expected_RTV).quantile(0.8) < 1e-6


def relative(found, expected):
    """The error of each row of logits, as a share of its length."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_quantised_weights_have_the_same_bits_in_any_company(scheme):
    decoder = quantised_decoder(scheme)
    rows = random_tokens(WIDE, 2, 200)
    whole = kernel_steps(decoder)((1, rows[1], 0, 50), (0, rows[0], 0, 200))[1]
    steps, seen = kernel_steps(decoder, threads=1), []
    for start, end in [(0, 9), (9, 10), (10, 110), (110, 199), (199, 200)]:
        seen.append(steps((0, rows[0], start, end), (1, rows[1], start, min(end, start + 3)))[0])
    assert torch.equal(torch.cat(seen), whole)


def test_any_number_of_threads_gives_the_same_bits():
    decoder = random_decoder(LONG)
    rows = random_tokens(LONG, 2, 300)
    found = []
    for threads in (1, 2, 3):
        steps = kernel_steps(decoder, threads)
        prefilled = steps((0, rows[0], 0, 290), (1, rows[1], 0, 150))
        found.append(torch.cat([*prefilled, *steps((0, rows[0], 290, 291), (1, rows[1], 150, 151))]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_another_arithmetic_gives_the_same_bits(activation, other_arithmetic, monkeypatch):
    decoder = quantised_decoder("int4", hidden_act=activation, rope_interleave=activation == "gelu")
    rows = random_tokens(WIDE, 2, 90)
    found = []
    for kernels in (builds.library(), other_arithmetic):
        monkeypatch.setattr(builds, "_outcome", lambda kernels=kernels: builds._Outcome(kernels, None, "here"))
        steps = kernel_steps(decoder)
        found.append(torch.cat([*steps((0, rows[0], 0, 80), (1, rows[1], 0, 3)), *steps((0, rows[0], 80, 90))]))
    assert torch.equal(*found)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.01), (torch.bfloat16, 0.08), (torch.int8, 0.08)])
def test_narrow_pages_are_near_wide_ones(dtype, error):
    decoder = small_decoder("dense")
    rows = random_tokens(decoder.config, 1, 60)
    steps = kernel_steps(decoder, dtype=dtype)
    logits = torch.cat([steps((0, rows[0], 0, 20))[0], steps((0, rows[0], 20, 60))[0]])
    with torch.no_grad():
        assert 0 < (logits - decoder(rows)[0]).abs().max() < error


def test_pages_of_4_bits_give_the_kernels_and_the_modules_the_same_numbers():
    decoder = small_decoder("dense")
    rows = random_tokens(decoder.config, 1, 60)
    plan = [(0, rows[0], 0, 20), (0, rows[0], 20, 60)]
    found, expected = (
        torch.cat([steps(piece)[0] for piece in plan])
        for steps in (kernel_steps(decoder, dtype=torch.uint8), Steps(decoder, dtype=torch.uint8))
    )
    # a number that lies between two codes may fall to either side
    assert relative(found, expected).median() < 1e-4


def test_logits_are_those_of_the_wanted_rows():
    decoder = small_decoder("dense")
    rows = random_tokens(decoder.config, 2, 20)
    every = kernel_steps(decoder)((0, rows[0], 0, 20), (1, rows[1], 0, 9))
    steps = kernel_steps(decoder)
    steps.wanted = [3, 28]
    assert torch.equal(steps((0, rows[0], 0, 20), (1, rows[1], 0, 9))[0], torch.stack([every[0][3], every[1][8]]))


def test_the_runner_says_how_it_computes():
    decoder, quantised = small_decoder("dense"), small_decoder("dense")
    quantise(quantised, QuantizeConfig(scheme="int8"))
    by = kernels_arithmetic()
    assert kernel_steps(decoder).runner.arithmetic == f"compiled kernels ({by}), keys and values in float32"
    coded = kernel_steps(quantised, dtype=torch.float16).runner
    assert coded.arithmetic == f"compiled kernels ({by}), activations of 8 bits, keys and values in float16"
    exact = Steps(quantised, partial(by_kernels, bits=16)).runner
    assert exact.arithmetic == f"compiled kernels ({by}), activations of 16 bits, keys and values in float32"
    modules = Steps(quantised, partial(by_modules, packed=2)).runner
    assert modules.arithmetic == (
        f"the model's modules in PyTorch (float32), products by compiled kernels ({by}), activations of 8 bits, "
        "keys and values in float32"
    )


def test_changed_weights_are_packed_again():
    decoder = small_decoder("dense")
    rows = random_tokens(decoder.config, 1, 20)
    steps = kernel_steps(decoder)
    steps((0, rows[0], 0, 20))
    with torch.no_grad():
        decoder.blocks[1].mlp.up_proj.weight.mul_(1.5)
    steps.runner.weights_changed()
    logits = steps((0, rows[0], 0, 20))[0]
    with torch.no_grad():
        assert (logits - decoder(rows)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_that_releases_its_codes_has_them_in_the_kernels_alone(scheme, tied):
    decoder, whole = (quantised_decoder(scheme, tie_word_embeddings=tied) for _ in range(2))
    rows = random_tokens(WIDE, 1, 20)
    steps = Steps(decoder, partial(by_kernels, threads=1, release=True))
    expected = kernel_steps(whole)((0, rows[0], 0, 20))[0]
    assert torch.equal(steps((0, rows[0], 0, 20))[0], expected)
    parts = quantised_parts(decoder)
    assert parts and all(part.is_released and part.codes is None for part in parts.values())
    for name, part in quantised_parts(whole).items():
        assert all(map(same, parts[name].stored.tensors.items(), part.stored.tensors.items())), name
        assert torch.equal(parts[name].weight, part.weight)
    assert decoder.device.type == "cpu" and torch.equal(decoder.embed_tokens(rows), whole.embed_tokens(rows))
    steps.runner.weights_changed()
    assert torch.equal(steps((0, rows[0], 0, 20))[0], expected) and all(part.is_released for part in parts.values())


def same(one, two):
    return one[0] == two[0] and torch.equal(one[1], two[1])


def test_released_codes_are_held_again_where_the_state_of_the_model_is_read_or_written():
    decoder, whole = quantised_decoder("int8"), quantised_decoder("int8")
    runner = Steps(decoder, partial(by_kernels, threads=1, release=True)).runner
    assert all(map(same, decoder.state_dict().items(), whole.state_dict().items()))
    runner.weights_changed()
    other = {name: torch.zeros_like(tensor) for name, tensor in whole.state_dict().items()}
    decoder.load_state_dict(other)
    assert not any(part.is_released or part.codes.any() for part in quantised_parts(decoder).values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"positions": [0, 400]}, "position 400 exceeds the model's 400"),
        ({"positions": [0, -1]}, "position -1 of row 1 is beyond the 2 pages of its table"),
        ({"positions": [0, 16]}, "position 16 of row 1 is beyond the 2 pages of its table"),
        ({"tables": [[[0, 4]]], "positions": [0, 9]}, "page 4 of row 1 is none of the 4 that there are"),
        ({"tables": [[[-1, 1]]]}, "page -1 of row 0 is none of the 4 that there are"),
        ({"tokens": [5, 263]}, "token 263 is none of the model's 263"),
        ({"wanted": [2]}, "row 2 is none of 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_there_is_an_error_and_never_read(changed, message):
    decoder = random_decoder(LONG)
    steps = CompiledSteps(decoder, PagedMemory(decoder.config, [4], 8, torch.float32), threads=1)
    given = {"tokens": [5, 7], "positions": [0, 1], "starts": [0, 2], "tables": [[[0, 1]]], "slots": [], "wanted": [1]}
    given |= {"drafts": [0], "prompts": [2], "adapters": [None]}
    steps.forward(Batch(**given))
    with pytest.raises(ValueError, match=message):
        steps.forward(Batch(**given | changed))


def test_threads_are_measured_and_leave_the_pages_as_they_were():
    decoder = small_decoder("dense")
    memory = PagedMemory(decoder.config, [4], 8, torch.float32)
    steps = CompiledSteps(decoder, memory)
    assert steps.threads >= 1
    assert all(not tensor.any() for pages in memory.layers.values() for tensor in pages if tensor is not None)


@pytest.mark.parametrize(("name", "reason"), OTHERS.items())
def test_what_is_not_plain_is_refused_with_its_reason(name, reason):
    assert CompiledSteps.supports(small_decoder(name)) == reason


def test_a_setting_that_the_step_does_not_know_is_refused_by_its_name():
    class NewerConfig(ModelConfig):
        residual_power: float = setting(1.0, "factor on what a block adds to the residual stream")

    decoder, own = small_decoder("dense"), BASE.model_dump(exclude={"vocab_size"})
    decoder.config = NewerConfig(**own, vocab_size=BASE.vocab_size)
    assert CompiledSteps.supports(decoder) is None
    decoder.config = decoder.config.with_changes(residual_power=0.22)
    assert CompiledSteps.supports(decoder) == "it sets residual_power, which the compiled step does not know"


def test_every_setting_of_a_model_is_computed_or_refused():
    """A new setting is put where it belongs in `plain_decoder.py`, and computed there or not."""
    refused_by_value = {
        "num_experts",
        "kv_lora_rank",
        "layer_types",
        "num_scores",
        "attention_output_gate",
        "position_type",
        "rope_scaling",
    }
    assert plain_decoder._COMPUTED | plain_decoder._WITHOUT_EFFECT | refused_by_value == ModelConfig.model_fields.keys()


def test_a_layer_of_another_kind_is_refused_by_its_name():
    class LoraLinear(nn.Linear):
        pass

    decoder = small_decoder("dense")
    decoder.blocks[1].mlp.down_proj = LoraLinear(64, 48, bias=False)
    assert CompiledSteps.supports(decoder) == "it has layers of the type LoraLinear"


def test_weights_of_float16_are_multiplied_as_they_are_stored():
    decoder = random_decoder(LONG).half()
    rows = random_tokens(LONG, 1, 90)[0]
    stored, widened = (kernel_steps(one, dtype=torch.float32) for one in (decoder, deepcopy(decoder).float()))
    assert torch.equal(stored((0, rows, 0, 90))[0], widened((0, rows, 0, 90))[0])
