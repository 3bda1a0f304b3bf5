"""Products with codes on a GPU, by Triton kernels: codes are read as they are stored and decoded within the product.

A tile of the weight is (rows, parts, values of a part): the numbers that scale a part are read and decoded once for it, and
meet its codes by broadcasting. Few rows of activations meet each tile as it is decoded, so that a step of decoding reads the
codes and nothing else. For many rows one matrix at a time is decoded into the activations' type, and the vendor's product
computes the rest. Products are in the activations' type, sums in float32.

Layouts of blocks are those of `blocks.py`. `TRITON_INTERPRET=1`, set before this is imported, runs the kernels on a processor.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from bessemer.core.environment import can_write_below, own_temporary_folder
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.base import Codes
from bessemer.model.quantisation.blocks import E2M1_DOUBLED, PLACES, GgufBlocks
from bessemer.model.quantisation.fp8 import Fp8
from bessemer.model.quantisation.quantised_decoder import read_weights
from bessemer.model.quantisation.quantised_layers import (
    PackedMatmuls,
    Product,
    QuantisedEmbedding,
    QuantisedLinear,
    QuantisedStack,
    VisitsProduct,
    quantised_parts,
)
from bessemer.model.quantisation.schemes import W8A8, Int4, Int8

# Triton keeps what it compiles in the home, which may not be written to
_home = os.environ.get("TRITON_HOME") or os.environ.get("HOME")
if "TRITON_CACHE_DIR" not in os.environ and _home and not can_write_below(Path(_home, ".triton")):
    os.environ["TRITON_CACHE_DIR"] = str(own_temporary_folder() / "triton")

# Shapes: M rows of activations, N outputs, K inputs, G groups of a row, E experts, V visits, T tiles of visits.

#: Most rows that meet tiles as they are decoded; more meet a decoded matrix.
FEW_ROWS = 64
#: Rows of activations, outputs and inputs of a tile.
_TILE_M, _TILE_N, _TILE_K = 16, 32, 128


class _Form(NamedTuple):
    """How a kernel reads a scheme. values and bytes of a block; part: values that share a scale."""

    kind: str
    values: int
    bytes: int
    part: int = 32


_BLOCKS = {
    "Q5_0": _Form("Q5_0", 32, 22),
    "Q5_1": _Form("Q5_1", 32, 24),
    "Q4_K": _Form("Q4_K", 256, 144),
    "Q5_K": _Form("Q5_K", 256, 176),
    "Q6_K": _Form("Q6_K", 256, 210, part=16),
    "IQ4_NL": _Form("IQ4_NL", 32, 18),
    "IQ4_XS": _Form("IQ4_XS", 256, 136),
    "MXFP4": _Form("MXFP4", 32, 17),
}


@triton.jit
def _byte(pointers):
    """Bytes as int32."""
    return tl.load(pointers).to(tl.int32)


@triton.jit
def _half(pointers):
    """float16 numbers from two bytes each, which need not lie at an even address."""
    bits = _byte(pointers) | (_byte(pointers + 1) << 8)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _nibble(pointers, high):
    """The high halves of bytes where `high`, else the low ones."""
    return (_byte(pointers) >> tl.where(high, 4, 0)) & 15


@triton.jit
def _in_groups(codes, scales, zeros, row, part, row_bytes, groups, group, KIND: tl.constexpr, PART: tl.constexpr):
    """Codes in rows, with scales in rows of their own: int8, two of 4 bits a byte, or e4m3."""
    j = tl.arange(0, PART)[None, None, :]
    at = row * groups + part * PART // group
    step = tl.load(scales + at)[:, :, None]
    if KIND == "int8":
        value = tl.load(codes + (row * row_bytes + part * PART)[:, :, None] + j).to(tl.float32) * step
    elif KIND == "fp8":
        bits = _byte(codes + (row * row_bytes + part * PART)[:, :, None] + j)
        # below the normal numbers the exponent is that of 1
        exponent, digits = (bits >> 3) & 15, bits & 7
        size = tl.where(exponent == 0, digits * 2, digits + 8).to(tl.float32) * tl.exp2((exponent - 10).to(tl.float32))
        value = tl.where((bits & 128) != 0, -size, size) * step
    else:
        code = _nibble(codes + (row * row_bytes + part * (PART // 2))[:, :, None] + j // 2, j % 2 == 1).to(tl.float32)
        if KIND == "int4 offset":
            value = code * step + tl.load(zeros + at)[:, :, None]
        elif KIND == "int4 code":
            value = (code - tl.load(zeros + at).to(tl.float32)[:, :, None]) * step
        else:
            value = (code - 8) * step
    return value


@triton.jit
def _k_type(block, within, KIND: tl.constexpr, PART: tl.constexpr):
    """Q4_K, Q5_K and Q6_K, of which scales are codes themselves."""
    j = tl.arange(0, PART)[None, None, :]
    blocks, inner = block[:, :, None], within[:, :, None]
    if KIND == "Q6_K":
        quarter, place = inner % 8 // 2, inner % 2 * 16 + j
        low = _nibble(blocks + inner // 8 * 64 + quarter % 2 * 32 + place, quarter >= 2)
        upper = (_byte(blocks + 128 + inner // 8 * 32 + place) >> (2 * quarter)) & 3
        scale = _byte(block + 192 + within).to(tl.int8).to(tl.float32) * _half(block + 208)
        value = ((low | (upper << 4)) - 32).to(tl.float32) * scale[:, :, None]
    else:
        # of the last four parts the low halves lie apart, and the two bits above them on top of the first four's
        first, late = within % 4, within >= 4
        rest = _byte(block + 12 + first)
        on_scales, on_lows = _byte(block + 4 + first), _byte(block + 8 + first)
        scale = tl.where(late, (rest & 15) | ((on_scales >> 6) << 4), on_scales & 63)
        low = tl.where(late, (rest >> 4) | ((on_lows >> 6) << 4), on_lows & 63)
        high = inner % 2 == 1
        if KIND == "Q4_K":
            code = _nibble(blocks + 16 + inner // 2 * 32 + j, high)
        else:
            code = _nibble(blocks + 48 + inner // 2 * 32 + j, high) | (((_byte(blocks + 16 + j) >> inner) & 1) << 4)
        steps, lows = _half(block) * scale.to(tl.float32), _half(block + 2) * low.to(tl.float32)
        value = code.to(tl.float32) * steps[:, :, None] - lows[:, :, None]
    return value


@triton.jit
def _other_block(block, within, table, KIND: tl.constexpr, PART: tl.constexpr):
    """Blocks of 32 neighbours with a scale, and IQ4_XS, which has eight such parts."""
    j = tl.arange(0, PART)[None, None, :]
    blocks = block[:, :, None]
    if KIND == "Q5_0":
        code = _nibble(blocks + 6 + j % 16, j >= 16) | (((_byte(blocks + 2 + j // 8) >> (j % 8)) & 1) << 4)
        value = (code - 16).to(tl.float32) * _half(block)[:, :, None]
    elif KIND == "Q5_1":
        code = _nibble(blocks + 8 + j % 16, j >= 16) | (((_byte(blocks + 4 + j // 8) >> (j % 8)) & 1) << 4)
        value = code.to(tl.float32) * _half(block)[:, :, None] + _half(block + 2)[:, :, None]
    elif KIND == "IQ4_XS":
        low = (_byte(block + 4 + within // 2) >> (within % 2 * 4)) & 15
        high = (_byte(block + 2 + within // 4) >> (within % 4 * 2)) & 3
        step = _half(block) * ((low | (high << 4)) - 32).to(tl.float32)
        code = _nibble(blocks + 8 + within[:, :, None] * 16 + j % 16, j >= 16)
        value = tl.load(table + code) * step[:, :, None]
    elif KIND == "IQ4_NL":
        value = tl.load(table + _nibble(blocks + 2 + j % 16, j >= 16)) * _half(block)[:, :, None]
    else:
        step = tl.exp2((_byte(block) - 128).to(tl.float32))
        value = tl.load(table + _nibble(blocks + 1 + j % 16, j >= 16)) * step[:, :, None]
    return value


@triton.jit
def _decoded(codes, scales, zeros, table, rows, parts, row_bytes, groups, group, KIND: tl.constexpr, VALUES: tl.constexpr,
             BYTES: tl.constexpr, PART: tl.constexpr):  # fmt: skip
    """Weights (rows, parts, PART) float32. rows (rows,) and parts (parts,): which; group: inputs that share a scale."""
    row, part = rows[:, None].to(tl.int64), parts[None, :]
    if VALUES == BYTES:
        value = _in_groups(codes, scales, zeros, row, part, row_bytes, groups, group, KIND, PART)
    else:
        # where each part's block begins, and its place in it
        within = part % (VALUES // PART)
        block = codes + row * row_bytes + (part // (VALUES // PART)).to(tl.int64) * BYTES
        within = tl.broadcast_to(within, block.shape)
        if KIND == "Q4_K" or KIND == "Q5_K" or KIND == "Q6_K":
            value = _k_type(block, within, KIND, PART)
        else:
            value = _other_block(block, within, table, KIND, PART)
    return value


@triton.jit
def _product_kernel(hidden, out, bias, codes, scales, zeros, table, experts, firsts, ends, rows_in_all, outputs, inputs,
                    row_bytes, groups, group, KIND: tl.constexpr, VALUES: tl.constexpr, BYTES: tl.constexpr,
                    PART: tl.constexpr, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr, TILE_M: tl.constexpr,
                    TILE_N: tl.constexpr, TILE_K: tl.constexpr):  # fmt: skip
    """A tile (TILE_M, TILE_N) of hidden (M, K) by the weight's transpose. GROUPED: the rows of a tile are one expert's."""
    tile = tl.program_id(0)
    expert = 0
    first = tile * TILE_M
    end = rows_in_all
    if GROUPED:
        expert = tl.load(experts + tile)
        first = tl.load(firsts + tile)
        end = tl.load(ends + tile)
    m = first + tl.arange(0, TILE_M)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    # outputs beyond the last are computed from its row, and not stored
    rows = tl.minimum(n, outputs - 1) + expert * outputs
    # zeros is itself a compiled function: it cannot be interpreted where Triton was loaded before TRITON_INTERPRET was set
    sums = tl.full((TILE_M, TILE_N), 0.0, tl.float32)
    for start in range(0, inputs, TILE_K):
        k = start + tl.arange(0, TILE_K)
        parts = start // PART + tl.arange(0, TILE_K // PART)
        mask = (m < end)[:, None] & (k < inputs)[None, :]
        read = tl.load(hidden + m[:, None].to(tl.int64) * inputs + k[None, :], mask=mask, other=0.0)
        # parts beyond the last are read from it, and meet zeros
        parts = tl.minimum(parts, inputs // PART - 1)
        weight = _decoded(codes, scales, zeros, table, rows, parts, row_bytes, groups, group, KIND, VALUES, BYTES, PART)
        weight = tl.reshape(weight, (TILE_N, TILE_K)).to(hidden.dtype.element_ty)
        # of a model in float32, whose user wants that; 16 bits are multiplied on tensor cores whatever this says
        sums += tl.dot(read, tl.trans(weight), input_precision="ieee")
    kept = (m < end)[:, None] & (n < outputs)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m[:, None].to(tl.int64) * outputs + n[None, :], sums.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _decode_kernel(out, codes, scales, zeros, table, outputs, inputs, row_bytes, groups, group, KIND: tl.constexpr,
                   VALUES: tl.constexpr, BYTES: tl.constexpr, PART: tl.constexpr, TILE_N: tl.constexpr,
                   TILE_K: tl.constexpr):  # fmt: skip
    """A tile (TILE_N, TILE_K) of the weight, in the type of `out`."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    k = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    parts = tl.minimum(tl.program_id(1) * (TILE_K // PART) + tl.arange(0, TILE_K // PART), inputs // PART - 1)
    rows = tl.minimum(n, outputs - 1)
    weight = _decoded(codes, scales, zeros, table, rows, parts, row_bytes, groups, group, KIND, VALUES, BYTES, PART)
    kept = (n < outputs)[:, None] & (k < inputs)[None, :]
    weight = tl.reshape(weight, (TILE_N, TILE_K)).to(out.dtype.element_ty)
    tl.store(out + n[:, None].to(tl.int64) * inputs + k[None, :], weight, mask=kept)


class GpuWeight(NamedTuple):
    """A matrix (N, K), or a stack of them, as the kernels read it. group: inputs that share one of its `scales`."""

    form: _Form
    outputs: int
    inputs: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    table: Tensor
    group: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of a kernel, from `row_bytes` on to the form's own."""
        row = self.codes.shape[-1]
        return row, self.scales.shape[-1], self.group, self.form.kind, self.form.values, self.form.bytes, self.form.part


def gpu_weight(stored: Codes) -> GpuWeight | None:
    """A weight's codes, where they lie, for the kernels; None for a scheme, a width or a group that they do not know."""
    scheme, tensors = stored.scheme, stored.tensors
    codes = tensors["codes"]
    scales = tensors.get("scales", codes)
    zeros, kind, inputs = scales, "", codes.shape[-1]
    table = scales
    if isinstance(scheme, GgufBlocks):
        form = _BLOCKS[scheme.kind]
        inputs = inputs // form.bytes * form.values
        places = {"MXFP4": E2M1_DOUBLED}.get(scheme.kind, PLACES)
        table = torch.tensor(places, dtype=torch.float32, device=codes.device)
        return GpuWeight(form, codes.shape[-2], inputs, codes.contiguous(), scales, zeros, table, form.part)
    if type(scheme) is Int8:
        kind = "int8"
    elif isinstance(scheme, Int4):
        kind = {"fixed": "int4", "code": "int4 code", "offset": "int4 offset"}[scheme.zero]
        zeros = scales if scheme.zero == "fixed" else tensors[{"code": "zeros", "offset": "offsets"}[scheme.zero]]
        inputs *= 2
    elif isinstance(scheme, Fp8):
        kind, codes = "fp8", codes.view(torch.uint8)
    if not kind:
        return None
    group = scheme.block if isinstance(scheme, Fp8) else -(-inputs // scales.shape[-1])
    part = 32
    if inputs % part or group % part:
        return None
    assert zeros is not None
    form = _Form(kind, part, part, part)
    return GpuWeight(form, codes.shape[-2], inputs, codes.contiguous(), scales.contiguous(), zeros.contiguous(), table, group)


def product(weight: GpuWeight, bias_N: Tensor | None, hidden: Tensor) -> Tensor:
    """hidden (…, K) by a matrix's transpose, and a bias, (…, N), in the type of `hidden`."""
    hidden_MK = hidden.reshape(-1, weight.inputs)
    if len(hidden_MK) > FEW_ROWS:
        matrix_NK = decoded(weight, hidden.dtype)
        return functional.linear(hidden, matrix_NK, None if bias_N is None else bias_N.to(hidden.dtype))
    out_MN = hidden.new_empty(len(hidden_MK), weight.outputs)
    if len(hidden_MK):
        _launch(weight, hidden_MK.contiguous(), out_MN, bias_N, -(-len(hidden_MK) // _TILE_M), None)
    return out_MN.view(*hidden.shape[:-1], weight.outputs)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """While entered, kernels are launched on a tensor's card, and not on the first."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def decoded(weight: GpuWeight, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) in a type."""
    out_NK = torch.empty(weight.outputs, weight.inputs, dtype=dtype, device=weight.codes.device)
    grid = (triton.cdiv(weight.outputs, _TILE_N), triton.cdiv(weight.inputs, _TILE_K))
    with on_device_of(out_NK):
        _decode_kernel[grid](
            out_NK, weight.codes, weight.scales, weight.zeros, weight.table, weight.outputs, weight.inputs, *weight.arguments,
            TILE_N=_TILE_N, TILE_K=_TILE_K,
        )  # fmt: skip
    return out_NK


class VisitTiles(NamedTuple):
    """Tiles of visits that are sorted by expert, all on the device: of each its expert, its first visit and the end of the
    expert's. As many as there can be; a tile of no visit ends where it begins."""

    experts_T: Tensor
    firsts_T: Tensor
    ends_T: Tensor


def visit_tiles(sizes_E: Tensor, visits: int) -> VisitTiles:
    """Tiles of `visits` visits, `sizes_E` of each expert. The host does not wait for the sizes."""
    tiles_E = (sizes_E + _TILE_M - 1) // _TILE_M
    ends_of_tiles_E, ends_E = tiles_E.cumsum(0), sizes_E.cumsum(0)
    tile_T = torch.arange(visits // _TILE_M + min(visits, len(sizes_E)), device=sizes_E.device)
    experts_T = torch.searchsorted(ends_of_tiles_E, tile_T, right=True).clamp(max=len(sizes_E) - 1)
    firsts_T = (ends_E - sizes_E)[experts_T] + (tile_T - (ends_of_tiles_E - tiles_E)[experts_T]) * _TILE_M
    return VisitTiles(*(part.to(torch.int32) for part in (experts_T, firsts_T, ends_E[experts_T])))


def grouped_product(weight: GpuWeight, visits_VK: Tensor, tiles: VisitTiles) -> Tensor:
    """Each visit by its expert's matrix of a stack, (V, N)."""
    out_VN = visits_VK.new_empty(len(visits_VK), weight.outputs)
    if len(visits_VK):
        _launch(weight, visits_VK.contiguous(), out_VN, None, len(tiles.experts_T), tiles)
    return out_VN


def _launch(
    weight: GpuWeight, hidden_MK: Tensor, out_MN: Tensor, bias_N: Tensor | None, row_tiles: int, tiles: VisitTiles | None
) -> None:
    grouping = tiles or VisitTiles(*[weight.codes] * 3)
    with on_device_of(out_MN):
        _product_kernel[(row_tiles, triton.cdiv(weight.outputs, _TILE_N))](
            hidden_MK, out_MN, out_MN if bias_N is None else bias_N, weight.codes, weight.scales, weight.zeros, weight.table,
            *grouping, len(hidden_MK), weight.outputs, weight.inputs, *weight.arguments, GROUPED=tiles is not None,
            HAS_BIAS=bias_N is not None, TILE_M=_TILE_M, TILE_N=_TILE_N, TILE_K=_TILE_K,
        )  # fmt: skip


def stack_product(weight: GpuWeight, visits_VK: Tensor, sizes_E: Tensor) -> Tensor:
    """`grouped_product` from the experts' numbers of visits."""
    return grouped_product(weight, visits_VK, visit_tiles(sizes_E, len(visits_VK)))


def gpu_products(model: Decoder) -> tuple[PackedMatmuls, list[str]]:
    """The matmuls of a model's codes by these kernels, and the names of the schemes that they do not know."""
    products: dict[QuantisedLinear, Product] = {}
    grouped: dict[QuantisedStack, VisitsProduct] = {}
    unknown: list[str] = []
    for part in quantised_parts(model).values():
        if isinstance(part, QuantisedEmbedding) and part is not model.head:
            continue
        weight = gpu_weight(part.stored)
        if weight is None:
            # activations of 8 bits have PyTorch's own product of integers
            unknown += [] if isinstance(part.scheme, W8A8) else [part.scheme.name]
        elif isinstance(part, QuantisedStack):
            grouped[part] = partial(stack_product, weight)
        elif isinstance(part, QuantisedLinear):
            products[part] = partial(product, weight, part.bias)
    return PackedMatmuls(products, grouped=grouped, weights=read_weights(model)), sorted(set(unknown))
