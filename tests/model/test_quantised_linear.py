from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bessemer.model.quantisation import schemes as w8a8
from bessemer.model.quantisation.integers import find_grid, in_groups, pack, round_to_nearest, search_grid, unpack
from bessemer.model.quantisation.quantised_layers import QuantisedEmbedding, QuantisedLinear
from bessemer.model.quantisation.schemes import W8A8, Int4, Int8, int8_product, padded_int_mm

SCHEMES = {
    "int8 by output": Int8(),
    "int8 in groups": Int8(32),
    "int4": Int4(32),
    "int4 with zeros": Int4(64, "code"),
}


def random_weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantised(weight, scheme, bias=None):
    layer = QuantisedLinear(weight.shape[1], weight.shape[0], scheme, bias=bias is not None)
    layer.take(round_to_nearest(weight, scheme))
    if bias is not None:
        layer.bias.data = bias
    return layer


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_weight_is_its_scale_times_its_code_less_the_zero(scheme):
    layer = quantised(random_weight(5, 128), scheme)
    size = scheme.group_size or 128
    for output, place in ((0, 0), (1, 33), (4, 127)):
        group = place // size
        if scheme.bits == 8:
            code, zero = int(layer.codes[output, place]), 0
        else:
            byte = int(layer.codes[output, place // 2])
            code = byte >> 4 if place % 2 else byte & 15
            zero = int(layer.zeros[output, group]) if scheme.zero == "code" else 8
        assert float(layer.weight[output, place]) == pytest.approx(float(layer.scales[output, group]) * (code - zero), rel=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_rounded_weight_is_half_a_step_from_its_own(scheme):
    weight = random_weight(7, 128)
    layer = quantised(weight, scheme)
    steps = layer.scales.repeat_interleave(scheme.group_of(128), dim=1)
    # at 4 bits the largest magnitude is cut by half a step; scales are rounded to float16
    assert ((layer.weight - weight).abs() <= steps * 0.51).all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_scales_are_numbers_that_float16_holds(scheme):
    scales = quantised(random_weight(6, 128) * 1e-3, scheme).scales
    assert torch.equal(scales, scales.half().float()) and (scales > 0).all()


def test_codes_of_four_bits_are_packed_with_the_even_one_low():
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    assert pack(codes)[0].tolist() == [0x10, 0x32, 0x54, 0x76]
    assert torch.equal(unpack(pack(codes)), codes)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_is_a_linear_layer_with_the_dequantised_weight(scheme, dtype):
    bias, hidden = random_weight(6), random_weight(2, 3, 128, seed=1).to(dtype)
    layer = quantised(random_weight(6, 128), scheme, bias)
    expected = functional.linear(hidden.double(), layer.weight.double(), bias.double())
    assert layer(hidden).dtype == dtype
    assert (layer(hidden) - expected).abs().max() <= {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]


def test_int8_activations_meet_int8_weights_in_exact_integers():
    layer = quantised(random_weight(9, 64), W8A8())
    hidden = random_weight(2, 5, 64, seed=1)
    scales = hidden.abs().amax(-1, keepdim=True) / 127.5
    codes = (hidden / scales).round().clamp(-128, 127)
    sums = codes.double() @ layer.codes.double().T
    assert (layer(hidden) - sums * scales * layer.scales[:, 0]).abs().max() <= 1e-5
    # and these are not the products with activations as they were
    assert (layer(hidden) - hidden @ layer.weight.T).abs().max() > 1e-3


def test_a_row_of_zeros_stays_zero_under_int8_activations():
    layer = quantised(random_weight(9, 64), W8A8())
    assert not int8_product(torch.zeros(2, 64), layer.stored, None).any()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_an_embedding_reads_the_rows_that_the_head_multiplies_by(scheme):
    table = QuantisedEmbedding(128, 11, scheme).take(round_to_nearest(random_weight(11, 128), scheme))
    tokens = torch.tensor([[3, 0], [10, 3]])
    assert torch.equal(table(tokens), table.weight[tokens])
    hidden = random_weight(2, 128, seed=2)
    assert torch.allclose(table.product(hidden), hidden @ table.weight.T, atol=1e-4)


def test_another_number_type_leaves_codes_and_scales_as_they_are():
    layer = quantised(random_weight(4, 64), Int4(32, "code"), random_weight(4))
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.named_buffers())
    assert layer.scales.dtype == torch.float32
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", [Int4(32), Int4(32, "code")])
def test_the_clip_search_never_has_a_larger_squared_error_than_plain_rounding(scheme):
    groups = in_groups(torch.cat((random_weight(20, 64), random_weight(20, 64, seed=1) ** 3)), scheme)
    plain, searched = find_grid(groups, scheme), search_grid(groups, scheme)
    errors = [(grid.rounded(groups, scheme) - groups).square().sum(-1) for grid in (plain, searched)]
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.95 * errors[0].sum()


def test_a_group_of_zeros_is_kept_as_zeros():
    for scheme in SCHEMES.values():
        assert not round_to_nearest(torch.zeros(3, 128), scheme).dequantised().any()


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("inputs", [64, 3000])
def test_sums_of_8_bits_are_exact_also_where_pytorchs_product_is_not(inputs, is_exact, monkeypatch):
    if is_exact and not w8a8._int_mm_is_exact():
        pytest.skip("this processor's product is not")
    monkeypatch.setattr(w8a8, "_int_mm_is_exact", lambda: is_exact)
    draw = torch.Generator().manual_seed(inputs)
    left, right = (torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, generator=draw) for rows in (5, 7))
    left[0], right[0] = 127, 127
    assert torch.equal(w8a8.integer_product(left, right).long(), left.long() @ right.long().T)


def test_a_product_that_adds_in_16_bits_is_found_out(monkeypatch):
    w8a8._int_mm_is_exact.cache_clear()
    try:
        monkeypatch.setattr(torch, "_int_mm", lambda left, right: (left.int() @ right.int()).clamp(max=(1 << 15) - 1))
        assert not w8a8._int_mm_is_exact()
    finally:
        w8a8._int_mm_is_exact.cache_clear()


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 5, 12), (17, 8, 16), (40, 24, 64)])
def test_products_of_integers_have_the_sizes_that_a_gpu_asks_for(rows, outputs, inputs, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-127, 128, (count, inputs), generator=generator).to(torch.int8) for count in (rows, outputs))

    def product(first, second):
        # cuBLAS's rules, as PyTorch states them
        assert first.shape[0] > 16 and first.shape[1] % 8 == 0 and second.shape[1] % 8 == 0
        assert first.dtype == second.dtype == torch.int8
        return first.int() @ second.int()

    monkeypatch.setattr(torch, "_int_mm", product)
    assert torch.equal(padded_int_mm(left, right), left.int() @ right.int().T)
