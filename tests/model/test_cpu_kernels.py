import ctypes

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import nn
from torch.utils import cpp_extension

from bessemer.model import cpu_kernels as builds
from bessemer.model.cpu_kernels.packed import MatrixFields, PackedMatrix
from bessemer.model.quantisation.base import BlockWeight, KernelWeight, NarrowFloatWeight
from bessemer.model.quantisation.blocks import BLOCK_FORMS, GgufBlocks
from bessemer.model.quantisation.integers import unpack
from tests.cases import slow_but

# Shapes: N outputs, K inputs, M rows, G groups.


class Layer(KernelWeight):
    """A weight for the kernels, and what it stands for."""

    def dequantised(self):
        wide = self.codes if self.codes.dtype == torch.int8 else unpack(self.codes).int()
        grouped, scales = wide.double().unflatten(-1, (-1, self.group_size)), self.scales[..., None].double()
        if self.offsets is not None:
            return (grouped * scales + self.offsets[..., None].double()).flatten(-2)
        zeros = self.zeros if self.zeros is not None else torch.full_like(self.scales, 8 * (self.codes.dtype == torch.uint8))
        return ((grouped - zeros[..., None].double()) * scales).flatten(-2)


def random_layer(bits, outputs, inputs, group, *, zeros=False, offsets=False, bias=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    low, high, width = (-127, 128, inputs) if bits == 8 else (0, 256, inputs // 2)
    codes = torch.randint(low, high, (outputs, width), generator=draw).to(torch.int8 if bits == 8 else torch.uint8)
    scales = torch.rand(outputs, inputs // group, generator=draw).half().float()
    points = torch.randint(0, 16, scales.shape, generator=draw).to(torch.uint8) if zeros else None
    lows = -torch.rand(scales.shape, generator=draw).half().float() * 8 if offsets else None
    return Layer(codes, scales, group, points, lows, torch.randn(outputs, generator=draw) if bias else None)


class Blocks(BlockWeight):
    """Blocks of a GGUF file for the kernels, and what they stand for."""

    def dequantised(self):
        return GgufBlocks(self.kind).dequantise({"codes": self.blocks}).double()


def random_blocks(kind, outputs, inputs, *, bias=False, seed=0):
    draw, form = torch.Generator().manual_seed(seed), BLOCK_FORMS[kind]
    blocks = torch.randint(0, 256, (outputs, inputs // form.values, form.bytes), generator=draw, dtype=torch.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = torch.randint(116, 130, blocks.shape[:2], generator=draw)
        return Blocks(blocks.flatten(1), kind, inputs, torch.randn(outputs, generator=draw) if bias else None)
    for at in [208] if kind == "Q6_K" else [0, 2] if form.has_offsets else [0]:
        blocks[..., at : at + 2] = torch.rand(*blocks.shape[:2], 1, generator=draw).half().view(torch.uint8)
    return Blocks(blocks.flatten(1), kind, inputs, torch.randn(outputs, generator=draw) if bias else None)


def random_linear(dtype, outputs, inputs, *, bias=False, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


def rows(count, inputs, seed=1):
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed))


def quantised_activations(x_MK):
    """The int8 activations that the kernels multiply, in groups of 32, as float64 (…, K)."""
    x_MGk = nn.functional.pad(x_MK, (0, -x_MK.shape[-1] % 32)).unflatten(-1, (-1, 32))
    most = x_MGk.abs().amax(-1, keepdim=True)
    codes = (x_MGk * torch.where(most > 0, 127 / most, 0)).round()
    return (codes.double() * (most / 127).double()).flatten(-2)[..., : x_MK.shape[-1]]


class NarrowFloats(NarrowFloatWeight):
    """Numbers of the type e4m3 for the kernels, and what they stand for."""

    def dequantised(self):
        spread = self.scales.double().repeat_interleave(self.group_size, dim=-1)[:, : self.codes.shape[1]]
        return self.codes.double() * spread


def random_narrow_floats(outputs, inputs, *, bias=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (outputs, inputs), generator=draw, dtype=torch.uint8)
    # every number of the type, but for its NaN
    codes = torch.where((codes & 127) == 127, 0, codes).view(torch.float8_e4m3fn)
    scales = torch.rand(outputs, -(-inputs // 128), generator=draw) * 0.01
    return NarrowFloats(codes, scales, 128, torch.randn(outputs, generator=draw) if bias else None)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("inputs", [128, 200, 576])
def test_a_product_by_e4m3_is_that_of_its_numbers(count, inputs):
    layer, x_MK = random_narrow_floats(48, inputs, bias=True), rows(count, inputs)
    matrix = PackedMatrix.of(layer)
    close(matrix.multiply(x_MK), x_MK.double() @ layer.dequantised().T + layer.bias.double(), 1e-6)
    assert torch.equal(matrix.row(37), layer.dequantised()[37].float())


LAYERS = {
    "F8": lambda outputs=80, inputs=256, **how: random_narrow_floats(outputs, inputs, **how),
    "Q8": lambda outputs=80, inputs=256, **how: random_layer(8, outputs, inputs, inputs, **how),
    "Q8, groups of 32": lambda outputs=80, inputs=256, **how: random_layer(8, outputs, inputs, 32, **how),
    "Q4": lambda outputs=80, inputs=256, **how: random_layer(4, outputs, inputs, 32, **how),
    "Q4, groups of 64": lambda outputs=80, inputs=256, **how: random_layer(4, outputs, inputs, 64, **how),
    "Q4 with zeros": lambda outputs=80, inputs=256, **how: random_layer(4, outputs, inputs, 32, zeros=True, **how),
    "Q4 with offsets": lambda outputs=80, inputs=256, **how: random_layer(4, outputs, inputs, 32, offsets=True, **how),
    **{
        kind: lambda outputs=80, inputs=256, kind=kind, **how: random_blocks(kind, outputs, inputs, **how)
        for kind in BLOCK_FORMS
    },
    "F16": lambda outputs=80, inputs=256, **how: random_linear(torch.float16, outputs, inputs, **how),
    "BF16": lambda outputs=80, inputs=256, **how: random_linear(torch.bfloat16, outputs, inputs, **how),
    "F32": lambda outputs=80, inputs=256, **how: random_linear(torch.float32, outputs, inputs, **how),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
#: Of activations that meet codes.
BITS = (8, 16)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if builds.library() is None:
        assert "no C++ compiler" in builds.unavailable()
        pytest.skip(builds.unavailable())


@pytest.mark.parametrize("count", [1, 7, 40])
@pytest.mark.parametrize(
    "bits, group, more",
    [
        *[
            (8, 576, {}),
            (8, 32, {}),
            (8, 64, {}),
            (4, 32, {}),
            (4, 576, {}),
            (4, 64, {"zeros": True}),
            (4, 32, {"zeros": True}),
        ],
        *[(4, 32, {"offsets": True}), (4, 576, {"offsets": True})],
    ],
)
def test_a_quantised_product_is_the_integer_sums_with_their_scales(bits, group, more, count):
    layer, x_MK = random_layer(bits, 48, 576, group, bias=True, **more), rows(count, 576)
    expected = quantised_activations(x_MK) @ layer.dequantised().T + layer.bias.double()
    close(PackedMatrix.of(layer).multiply(x_MK), expected, 1e-5)


@pytest.mark.parametrize("kind", BLOCK_FORMS)
def test_a_product_by_blocks_is_the_integer_sums_with_the_scales_that_the_gguf_package_decodes(kind):
    layer, x_MK = random_blocks(kind, 48, 512, bias=True), rows(7, 512)
    weight_NK = torch.from_numpy(quants.dequantize(layer.blocks.numpy(), GGMLQuantizationType[kind]))
    expected = quantised_activations(x_MK) @ weight_NK.double().T + layer.bias.double()
    close(PackedMatrix.of(layer).multiply(x_MK), expected, 1e-5)


@pytest.mark.parametrize("kind", BLOCK_FORMS)
def test_packed_blocks_are_read_back_byte_by_byte(kind):
    layers = [random_blocks(kind, outputs, 512, seed=outputs) for outputs in (64, 20)]
    matrix = PackedMatrix.of(*layers)
    outputs_N = torch.tensor([[83, 0], [63, 64]])
    assert torch.equal(matrix.unpacked_blocks(outputs_N, kind), torch.cat([layer.blocks for layer in layers])[outputs_N])
    with pytest.raises(IndexError, match="84 of 84"):
        matrix.unpacked_blocks(torch.tensor([84]), kind)


CODED = [name for name in LAYERS if name not in ("F16", "BF16", "F32")]


@pytest.mark.parametrize("name", CODED)
def test_with_activations_of_16_bits_a_product_is_that_of_the_decoded_weights(name):
    layer, x_MK = LAYERS[name](bias=True), rows(7, 256)
    expected = x_MK.double() @ layer.dequantised().T + layer.bias.double()
    matrix = PackedMatrix.of(layer)
    errors = [(matrix.multiply(x_MK, activation_bits=bits).double() - expected).abs().max() for bits in BITS]
    assert errors[1] < 1e-4 * expected.abs().max()
    # activations stay floats beside codes of F8
    assert errors[1] == errors[0] if name == "F8" else errors[1] < errors[0] / 20


@pytest.mark.parametrize("name", [name for name in CODED if name not in ("Q8", "F8")])
def test_the_second_codes_are_of_what_the_first_leave_and_add_their_product(name):
    matrix, x_MK = PackedMatrix.of(LAYERS[name]()), rows(5, 256)
    rest_MK = (x_MK.double() - quantised_activations(x_MK)).float()
    assert 0 < rest_MK.abs().max() < 0.01 * x_MK.abs().max()
    assert torch.equal(matrix.multiply(x_MK, activation_bits=16), matrix.multiply(x_MK) + matrix.multiply(rest_MK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_float_product_keeps_the_activations_as_they_are(dtype):
    layer, x_MK = random_linear(dtype, 48, 576, bias=True), rows(9, 576)
    expected = x_MK.double() @ layer.weight.double().T + layer.bias.double()
    close(PackedMatrix.of(layer).multiply(x_MK), expected.detach(), 1e-5)


def close(found, expected, share):
    """Equal but for a share of the largest."""
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=share * expected.abs().max().item())


@each_layer
def test_a_row_does_not_depend_on_the_rows_beside_it(layer):
    matrix, x_MK = PackedMatrix.of(layer(bias=True)), rows(70, 256)
    for bits in BITS:
        together = matrix.multiply(x_MK, activation_bits=bits)
        for first, last in [(0, 1), (1, 3), (3, 10), (10, 26), (5, 70)]:
            assert torch.equal(matrix.multiply(x_MK[first:last], activation_bits=bits), together[first:last])


@each_layer
def test_a_product_does_not_depend_on_the_number_of_threads(layer):
    matrix = PackedMatrix.of(layer())
    for count, bits in ((1, 8), (33, 8), (1, 16), (33, 16)):
        x_MK = rows(count, 256)
        alone, *others = (matrix.multiply(x_MK, threads, bits) for threads in (1, 2, 3))
        assert all(torch.equal(alone, other) for other in others)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("count", slow_but([1, 5, 40], [1, 2, 3, 4, 5, 40]))
def test_another_arithmetic_gives_the_same_bits(name, count, compute_elsewhere):
    matrix, x_MK = PackedMatrix.of(LAYERS[name](bias=True)), rows(count, 256)
    here = [matrix.multiply(x_MK, activation_bits=bits) for bits in BITS]
    compute_elsewhere()
    assert all(torch.equal(matrix.multiply(x_MK, activation_bits=bits), found) for bits, found in zip(BITS, here, strict=True))


@pytest.mark.parametrize("bits, low, high, offsets", [(8, -128, 127, False), (4, 0, 255, False), (4, 0, 255, True)])
def test_the_largest_codes_and_activations_do_not_overflow(bits, low, high, offsets, compute_elsewhere):
    layer, x_MK = random_layer(bits, 32, 256, 32, offsets=offsets), torch.tensor([1.0, -1.0])[:, None].expand(2, 256)
    layer.codes[:16], layer.codes[16:] = low, high
    compute_elsewhere()
    close(PackedMatrix.of(layer).multiply(x_MK), quantised_activations(x_MK) @ layer.dequantised().T, 1e-6)


@pytest.mark.parametrize("kind", BLOCK_FORMS)
def test_the_largest_codes_of_blocks_do_not_overflow(kind, compute_elsewhere):
    layer, x_MK = random_blocks(kind, 32, 256), torch.tensor([1.0, -1.0])[:, None].expand(2, 256)
    scales = layer.blocks.unflatten(-1, (-1, BLOCK_FORMS[kind].bytes))
    numbers = scales[..., 208:].clone() if kind == "Q6_K" else scales[..., :4].clone()
    # the largest number of MXFP4 is that of the code 7
    layer.blocks[:] = 0x77 if kind == "MXFP4" else 255
    if kind == "Q6_K":
        scales[..., 208:] = numbers
    else:
        scales[..., : 4 if BLOCK_FORMS[kind].has_offsets else 2] = numbers[..., : 4 if BLOCK_FORMS[kind].has_offsets else 2]
    compute_elsewhere()
    close(PackedMatrix.of(layer).multiply(x_MK), quantised_activations(x_MK) @ layer.dequantised().T, 1e-6)


@pytest.mark.parametrize("outputs, inputs", [(1, 32), (33, 100), (47, 36)])
@pytest.mark.parametrize("name", ["Q8", "Q4", "F16", "BF16", "F32"])
def test_outputs_and_inputs_may_have_any_size(name, outputs, inputs):
    draw = {
        "Q8": lambda: random_layer(8, outputs, inputs, inputs, bias=True),
        "Q4": lambda: random_layer(4, outputs, inputs, inputs, bias=True),
        "F16": lambda: random_linear(torch.float16, outputs, inputs, bias=True),
        "BF16": lambda: random_linear(torch.bfloat16, outputs, inputs, bias=True),
        "F32": lambda: random_linear(torch.float32, outputs, inputs, bias=True),
    }
    layer, x_MK = draw[name](), rows(5, inputs)
    if isinstance(layer, Layer):
        expected = quantised_activations(x_MK) @ layer.dequantised().T
    else:
        expected = (x_MK.double() @ layer.weight.double().T).detach()
    close(PackedMatrix.of(layer).multiply(x_MK), expected + layer.bias.detach().double(), 1e-5)


@each_layer
def test_layers_packed_as_one_give_what_each_gives(layer):
    layers, x_MK = [layer(outputs=n, bias=n == 40, seed=n) for n in (64, 40, 24)], rows(3, 256)
    assert torch.equal(
        PackedMatrix.of(*layers).multiply(x_MK), torch.cat([PackedMatrix.of(one).multiply(x_MK) for one in layers], dim=1)
    )


@each_layer
def test_a_part_of_a_matrix_gives_its_outputs_from_the_same_memory(layer):
    layers, x_MK = [layer(outputs=n, bias=n == 40, seed=n) for n in (64, 40, 24)], rows(3, 256)
    whole = PackedMatrix.of(*layers)
    for first, last in ((0, 64), (64, 104), (96, 128)):
        part = whole.part(first, last)
        assert torch.equal(part.multiply(x_MK), whole.multiply(x_MK)[:, first:last])
        codes, all_codes = part._tensors[0], whole._tensors[0]
        assert codes.untyped_storage().data_ptr() == all_codes.untyped_storage().data_ptr()


@each_layer
def test_a_row_of_the_matrix_is_the_weights_of_its_output(layer):
    one = layer()
    expected = one.dequantised().float() if hasattr(one, "dequantised") else one.weight.detach().float()
    matrix = PackedMatrix.of(one)
    assert torch.equal(torch.stack([matrix.row(n) for n in range(80)]), expected)


def test_inputs_may_be_bfloat16_of_any_leading_shape():
    matrix, x = PackedMatrix.of(LAYERS["Q4"]()), rows(6, 256).bfloat16()
    product = matrix.multiply(x.view(2, 3, 256))
    assert product.shape == (2, 3, 80) and product.dtype == torch.bfloat16
    assert torch.equal(product.flatten(0, 1), matrix.multiply(x.float()).bfloat16())


@each_layer
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows_and_spoils_no_other(layer, wrong):
    matrix = PackedMatrix.of(layer())
    for bits in BITS:
        x_MK = rows(3, 256)
        expected = matrix.multiply(x_MK, activation_bits=bits)
        x_MK[1, 40] = wrong
        found = matrix.multiply(x_MK, activation_bits=bits)
        assert not found[1].isfinite().any()
        assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_activations_of_zero_and_of_almost_zero_give_zero():
    matrix = PackedMatrix.of(LAYERS["Q4"]())
    assert torch.equal(matrix.multiply(torch.zeros(2, 256)), torch.zeros(2, 80))
    for bits in BITS:
        assert torch.equal(matrix.multiply(torch.full((2, 256), 1e-38), activation_bits=bits), torch.zeros(2, 80))


def test_rows_and_outputs_that_are_not_there_are_errors():
    matrix = PackedMatrix.of(LAYERS["Q4"]())
    with pytest.raises(ValueError, match=r"rows \(2, 100\) on cpu do not fit"):
        matrix.multiply(torch.zeros(2, 100))
    with pytest.raises(IndexError, match="output 80 of 80"):
        matrix.row(80)
    # which of them depends on the build of PyTorch
    with pytest.raises((ValueError, RuntimeError), match="have 8 or 16 bits"):
        matrix.multiply(torch.zeros(2, 256), activation_bits=12)


def test_layers_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="of one kind"):
        PackedMatrix.of(LAYERS["Q4"](), LAYERS["Q8"]())
    with pytest.raises(ValueError, match="have offsets cannot be packed together"):
        PackedMatrix.of(LAYERS["Q4"](), LAYERS["Q4 with offsets"]())
    with pytest.raises(ValueError, match="one size of groups"):
        PackedMatrix.of(LAYERS["Q4"](), LAYERS["Q4, groups of 64"]())
    with pytest.raises(ValueError, match="its groups have 96 weights"):
        PackedMatrix.of(random_layer(4, 16, 192, 96))
    with pytest.raises(ValueError, match="cannot be packed together with codes"):
        PackedMatrix.of(LAYERS["Q4_K"](), LAYERS["Q4"]())
    with pytest.raises(ValueError, match="float64"):
        PackedMatrix.of(nn.Linear(32, 16, dtype=torch.float64))


def test_python_and_cpp_agree_on_a_matrix():
    assert builds.library().bessemer_matrix_size() == ctypes.sizeof(MatrixFields)


def test_without_a_compiler_there_is_a_reason_instead_of_kernels(monkeypatch, fresh):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert builds.library() is None
    assert "'no-such-compiler' does not run" in builds.unavailable()


def test_kernels_that_do_not_compile_give_the_reason(monkeypatch, fresh):
    monkeypatch.setattr(builds, "_OPTIONS", (*builds._OPTIONS, "-no-such-option"))
    assert builds.library() is None
    assert "do not compile" in builds.unavailable() and "no-such-option" in builds.unavailable()


def test_an_environment_and_a_cache_whose_paths_have_spaces_are_compiled_in(monkeypatch, tmp_path):
    installed = tmp_path / "my own copy" / "lib"
    installed.parent.mkdir()
    installed.symlink_to(cpp_extension.TORCH_LIB_PATH)
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(installed))
    source, folder = tmp_path / "one.cpp", tmp_path / "a cache"
    source.write_text('extern "C" int one() { return 1; }\n', encoding="utf-8")
    folder.mkdir()
    builds._compile("kernels_in_spaces", [str(source)], ["-O0"], folder, folder / "kernels.so")
    assert ctypes.CDLL(str(folder / "kernels.so")).one() == 1 and str(installed) == cpp_extension.TORCH_LIB_PATH


def test_another_processor_has_a_library_of_its_own(monkeypatch, fresh):
    built = []
    monkeypatch.setattr(builds, "_compile", lambda name, *_: built.append(name) or (_ for _ in ()).throw(OSError("stop")))
    for features in (["avx2"], ["avx2", "avx512f"]):
        monkeypatch.setattr(builds, "_processor_features", lambda found=features: found)
        with pytest.raises(builds.KernelsError, match="stop"):
            builds.build()
    assert len(set(built)) == 2


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library is known, none was ever compiled, and none is installed."""
    monkeypatch.setattr(builds.prebuilt, "installed", lambda: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    builds._outcome.cache_clear()
    yield
    builds._outcome.cache_clear()


@pytest.mark.parametrize("exponent", [0, 1, 2, 127, 128, 250])
def test_powers_of_two_are_exact_from_the_smallest_to_the_largest(exponent, compute_elsewhere):
    layer = random_blocks("MXFP4", 16, 32)
    layer.blocks[:, 0] = exponent
    # the first input alone, whose code is 1, or 0.5
    layer.blocks[:, 1:] = 0
    layer.blocks[:, 1] = 1
    compute_elsewhere()
    matrix, x_MK = PackedMatrix.of(layer), torch.zeros(1, 32)
    x_MK[0, 0] = 127.0
    assert torch.equal(matrix.row(3), layer.dequantised()[3].float())
    assert matrix.multiply(x_MK)[0, 3] == 127.0 * 2.0 ** (exponent - 128)
