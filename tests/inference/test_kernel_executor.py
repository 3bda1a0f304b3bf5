"""Whole batches through a plain decoder in C++, beside the decoder's own modules."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from bessemer.inference.kernel_executor import KernelExecutor
from bessemer.inference.paged_cache import PagedMemory
from bessemer.model.kernels import build as builds
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantised_linear import QuantisedLinear
from tests.inference.models import BASE, WINDOWS, small_decoder
from tests.inference.steps import Steps, mixed_steps
from tests.model.randomised import SHAPES, random_decoder, random_tokens

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
    return Steps(decoder, partial(KernelExecutor, threads=threads), **how)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
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
                part.register_forward_pre_hook(lambda module, inputs: (quantised_activations(inputs[0]),))
    if isinstance(decoder.head, QuantisedLinear):
        decoder.norm.register_forward_hook(lambda module, inputs, normed: quantised_activations(normed))
    return decoder


def quantised_activations(hidden):
    """int8 in groups of 32 neighbours, the largest ±127, and back."""
    grouped = hidden.unflatten(-1, (-1, 32))
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    return ((grouped / scale).round() * scale).flatten(-2)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_weights_meet_activations_of_8_bits(scheme, tied):
    decoder = quantised_decoder(scheme, tie_word_embeddings=tied)
    rows = random_tokens(WIDE, 3, 60)
    found = mixed_steps(kernel_steps(decoder), rows)
    with_activations_of_8_bits(decoder)
    errors = []
    with torch.no_grad():
        for text, logits in found.items():
            expected = decoder(rows[text : text + 1])[0, : len(logits)]
            errors.append((logits - expected).norm(dim=-1) / expected.norm(dim=-1))
    # a code that falls to the other side of a half moves its row, and those that see it; many have seen none
    assert torch.cat(errors).quantile(0.1) < 1e-6
    assert torch.cat(errors).max() < 0.1


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


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.01), (torch.bfloat16, 0.08), (torch.int8, 0.08)])
def test_narrow_pages_are_near_wide_ones(dtype, error):
    decoder = small_decoder("dense")
    rows = random_tokens(decoder.config, 1, 60)
    steps = kernel_steps(decoder, dtype=dtype)
    logits = torch.cat([steps((0, rows[0], 0, 20))[0], steps((0, rows[0], 20, 60))[0]])
    with torch.no_grad():
        assert 0 < (logits - decoder(rows)[0]).abs().max() < error


def test_logits_are_those_of_the_wanted_rows():
    decoder = small_decoder("dense")
    rows = random_tokens(decoder.config, 2, 20)
    every = kernel_steps(decoder)((0, rows[0], 0, 20), (1, rows[1], 0, 9))
    steps = kernel_steps(decoder)
    steps.wanted = [3, 28]
    assert torch.equal(steps((0, rows[0], 0, 20), (1, rows[1], 0, 9))[0], torch.stack([every[0][3], every[1][8]]))


def test_changed_weights_are_packed_again():
    decoder = small_decoder("dense")
    rows = random_tokens(decoder.config, 1, 20)
    steps = kernel_steps(decoder)
    steps((0, rows[0], 0, 20))
    with torch.no_grad():
        decoder.blocks[1].mlp.up_proj.weight.mul_(1.5)
    steps.executor.weights_changed()
    logits = steps((0, rows[0], 0, 20))[0]
    with torch.no_grad():
        assert (logits - decoder(rows)[0]).abs().max() < 1e-4


def test_threads_are_measured_and_leave_the_pages_as_they_were():
    decoder = small_decoder("dense")
    memory = PagedMemory(decoder.config, [4], 8, torch.float32)
    executor = KernelExecutor(decoder, memory)
    assert executor.threads >= 1
    assert all(not tensor.any() for pages in memory.layers.values() for tensor in pages if tensor is not None)


@pytest.mark.parametrize(("name", "reason"), OTHERS.items())
def test_what_is_not_plain_is_refused_with_its_reason(name, reason):
    assert KernelExecutor.supports(small_decoder(name)) == reason


def test_a_layer_of_another_kind_is_refused_by_its_name():
    class LoraLinear(nn.Linear):
        pass

    decoder = small_decoder("dense")
    decoder.blocks[1].mlp.down_proj = LoraLinear(64, 48, bias=False)
    assert KernelExecutor.supports(decoder) == "it has layers of the type LoraLinear"


def test_weights_of_float16_are_refused():
    assert KernelExecutor.supports(small_decoder("dense").half()) == "its weights are float16"
