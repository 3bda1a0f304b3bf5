"""Encodes weights in llama.cpp's quantised types, with each input's importance where one is known.

A block's scale s (and offset m) minimise the weighted squared error Σ w (x - (s q + m))² over its codes q: for given codes the
best s and m are those of weighted least squares, in closed form; codes are tried for a range of first scales, and those of the
least error stay. In the K types the scales of a block's parts are codes themselves, of 6 or 8 bits.

w is what an input weighs: with an importance matrix E[a²] of the activation a that it meets (`gguf_imatrix`), times √(σ² + x²),
which spares large weights; without one of x itself. The tries and the weights are those of llama.cpp, whose bytes come out but
for rare ties of rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bessemer.core.environment import usable_cores
from bessemer.model.formats.gguf_blocks import BLOCK_TYPES, BlockType

Floats = NDArray[np.float32]
Whole = NDArray[np.int32]

# Shapes: R rows, K inputs, P parts with a scale each, V values of a part, B blocks, G parts of a block.

#: Values that a thread works on at a time: what is made of them fits its cache.
_VALUES_AT_ONCE = 1 << 16
#: Largest magnitude of a part that counts as zeros.
_NOTHING = np.float32(1e-15)
_BY_NAME = {kind.name: kind for kind in BLOCK_TYPES.values()}


class _Tries(NamedTuple):
    """First scales that `fit_offset` tries: (levels + first + step · i) / (max - min), i up to `last`."""

    first: float
    step: float
    last: int


_WITH_IMPORTANCE = _Tries(-0.9, 0.05, 36)
_WITHOUT = {15: _Tries(-1.0, 0.1, 20), 31: _Tries(-0.5, 0.1, 15)}


def fit_signed(values_PV: Floats, weights_PV: Floats, levels: int) -> tuple[Floats, Whole]:
    """Scales (P,) and codes (P, V) from -levels to levels - 1 with values ≈ scale · code."""
    largest_P = np.take_along_axis(values_PV, np.abs(values_PV).argmax(1)[:, None], 1)[:, 0]
    is_there_P = np.abs(largest_P) >= _NOTHING
    safe_P1 = np.where(is_there_P, largest_P, np.float32(1))[:, None]
    best_lx_P = best_l2_P = codes_PV = None
    for tried in (0, *(i for i in range(-9, 10) if i)):
        inverse_P1 = -(np.float32(levels) + np.float32(0.1) * np.float32(tried)) / safe_P1
        tried_PV = np.clip(np.rint(inverse_P1 * values_PV), -levels, levels - 1)
        weighted_PV = weights_PV * tried_PV
        lx_P, l2_P = (weighted_PV * values_PV).sum(1), (weighted_PV * tried_PV).sum(1)
        if codes_PV is None or best_lx_P is None or best_l2_P is None:
            codes_PV, best_lx_P, best_l2_P = tried_PV, lx_P, l2_P
            continue
        is_better_P = (l2_P > 0) & (lx_P * lx_P * best_l2_P > best_lx_P * best_lx_P * l2_P)
        codes_PV = np.where(is_better_P[:, None], tried_PV, codes_PV)
        best_lx_P, best_l2_P = np.where(is_better_P, lx_P, best_lx_P), np.where(is_better_P, l2_P, best_l2_P)
    assert codes_PV is not None and best_lx_P is not None and best_l2_P is not None
    scales_P = np.divide(best_lx_P, best_l2_P, out=np.zeros_like(best_lx_P), where=is_there_P & (best_l2_P > 0))
    return scales_P, np.where(is_there_P[:, None], codes_PV, 0).astype(np.int32)


def fit_offset(values_PV: Floats, weights_PV: Floats, levels: int, tries: _Tries) -> tuple[Floats, Floats, Whole]:
    """Scales and offsets (P,), both at least 0, and codes (P, V) from 0 to levels with values ≈ scale · code - offset."""
    low_P = np.minimum(values_PV.min(1), 0)
    high_P = values_PV.max(1)
    is_there_P = high_P > low_P
    range_P1 = np.where(is_there_P, high_P - low_P, np.float32(1))[:, None]
    weight_P, sum_P = weights_PV.sum(1), (weights_PV * values_PV).sum(1)
    codes_PV = np.clip(np.rint(np.float32(levels) / range_P1 * (values_PV - low_P[:, None])), 0, levels)
    scales_P = range_P1[:, 0] / np.float32(levels)
    offsets_P = low_P
    error_P = (weights_PV * (scales_P[:, None] * codes_PV + low_P[:, None] - values_PV) ** 2).sum(1)
    for tried in range(tries.last + 1):
        # from the best offset so far: it moves the first scale as well
        first = np.float32(tries.first) + np.float32(tries.step) * np.float32(tried) + np.float32(levels)
        inverse_P1 = first / np.where(is_there_P, high_P - offsets_P, np.float32(1))[:, None]
        tried_PV = np.clip(np.rint(inverse_P1 * (values_PV - offsets_P[:, None])), 0, levels)
        weighted_PV = weights_PV * tried_PV
        l_P, l2_P, xl_P = weighted_PV.sum(1), (weighted_PV * tried_PV).sum(1), (weighted_PV * values_PV).sum(1)
        determinant_P = weight_P * l2_P - l_P * l_P
        is_solved_P = determinant_P > 0
        safe_P = np.where(is_solved_P, determinant_P, np.float32(1))
        scale_P, offset_P = (weight_P * xl_P - sum_P * l_P) / safe_P, (l2_P * sum_P - l_P * xl_P) / safe_P
        # an offset above 0 has no code
        is_above_P = offset_P > 0
        scale_P = np.where(is_above_P, np.divide(xl_P, l2_P, out=np.zeros_like(xl_P), where=l2_P > 0), scale_P)
        offset_P = np.where(is_above_P, 0, offset_P)
        tried_error_P = (weights_PV * (scale_P[:, None] * tried_PV + offset_P[:, None] - values_PV) ** 2).sum(1)
        is_better_P = is_solved_P & (tried_error_P < error_P)
        codes_PV = np.where(is_better_P[:, None], tried_PV, codes_PV)
        scales_P, offsets_P = np.where(is_better_P, scale_P, scales_P), np.where(is_better_P, offset_P, offsets_P)
        error_P = np.where(is_better_P, tried_error_P, error_P)
    scales_P = np.where(is_there_P, scales_P, 0)
    codes_PV = np.where(is_there_P[:, None], codes_PV, 0)
    return scales_P.astype(np.float32), -offsets_P.astype(np.float32), codes_PV.astype(np.int32)


def fit_positive(values_BG: Floats, weights_BG: Floats, levels: int) -> tuple[Floats, Whole]:
    """Scales (B,) and codes (B, G) from 0 to levels of values of at least 0; codes are then moved one by one."""
    high_B = values_BG.max(1)
    is_there_B1 = (high_B >= _NOTHING)[:, None]
    safe_B1 = np.where(is_there_B1, high_B[:, None], np.float32(1))
    inverse_B1 = np.float32(levels) / safe_B1
    codes_BG = np.rint(inverse_B1 * values_BG)
    error_B = (weights_BG * (values_BG - codes_BG / inverse_B1) ** 2).sum(1)
    for tried in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried_B1 = (np.float32(0.1) * np.float32(tried) + np.float32(levels)) / safe_B1
        tried_BG = np.minimum(np.rint(tried_B1 * values_BG), levels)
        tried_error_B = (weights_BG * (values_BG - tried_BG / tried_B1) ** 2).sum(1)
        is_better_B = tried_error_B < error_B
        error_B = np.where(is_better_B, tried_error_B, error_B)
        inverse_B1 = np.where(is_better_B[:, None], tried_B1, inverse_B1)
    codes_BG = np.minimum(np.rint(inverse_B1 * values_BG), levels)
    lx_B, l2_B = (weights_BG * values_BG * codes_BG).sum(1), (weights_BG * codes_BG**2).sum(1)
    for _ in range(5):
        changed = False
        for part in range(values_BG.shape[1]):
            value_B, weight_B, code_B = values_BG[:, part], weights_BG[:, part], codes_BG[:, part]
            rest_lx_B, rest_l2_B = lx_B - weight_B * value_B * code_B, l2_B - weight_B * code_B**2
            may_B = (rest_lx_B > 0) & (rest_l2_B > 0)
            ratio_B = np.divide(rest_l2_B, rest_lx_B, out=np.zeros_like(lx_B), where=may_B)
            new_B = np.minimum(np.rint(value_B * ratio_B), levels)
            new_lx_B, new_l2_B = rest_lx_B + weight_B * value_B * new_B, rest_l2_B + weight_B * new_B**2
            is_better_B = may_B & (new_B != code_B) & (new_lx_B**2 * l2_B > lx_B**2 * new_l2_B)
            codes_BG[:, part] = np.where(is_better_B, new_B, code_B)
            lx_B, l2_B = np.where(is_better_B, new_lx_B, lx_B), np.where(is_better_B, new_l2_B, l2_B)
            changed = changed or bool(is_better_B.any())
        if not changed:
            break
    scales_B = np.divide(lx_B, l2_B, out=np.zeros_like(lx_B), where=is_there_B1[:, 0] & (l2_B > 0))
    return scales_B, np.where(is_there_B1, codes_BG, 0).astype(np.int32)


# ----------------------------------------------------------------------------------------------------- blocks of 32


def _row_weights(values_RK: Floats, importance_K: Floats) -> Floats:
    """E[a²] · √(mean of x² of the row + x²)."""
    mean_R1 = (values_RK**2).sum(1, keepdims=True) / np.float32(values_RK.shape[1])
    return importance_K * np.sqrt(mean_R1 + values_RK**2)


def _signed_blocks(values_RK: Floats, importance_K: Floats, kind: BlockType, levels: int) -> np.ndarray:
    values_PV = values_RK.reshape(-1, 32)
    scales_P, codes_PV = fit_signed(values_PV, _row_weights(values_RK, importance_K).reshape(-1, 32), levels)
    blocks = np.zeros(len(values_PV), kind.layout)
    blocks["d"] = scales_P
    _fill_nibbles(blocks, codes_PV + levels)
    return blocks


def _offset_blocks(values_RK: Floats, importance_K: Floats, kind: BlockType, levels: int) -> np.ndarray:
    values_PV = values_RK.reshape(-1, 32)
    weights_PV = _row_weights(values_RK, importance_K).reshape(-1, 32)
    scales_P, offsets_P, codes_PV = fit_offset(values_PV, weights_PV, levels, _WITH_IMPORTANCE)
    blocks = np.zeros(len(values_PV), kind.layout)
    blocks["d"], blocks["m"] = scales_P, -offsets_P
    _fill_nibbles(blocks, codes_PV)
    return blocks


def _fill_nibbles(blocks: np.ndarray, codes_PV: Whole) -> None:
    """Value i in the low half of byte i, i + 16 in the high half, fifth bits in a word."""
    blocks["q"] = (codes_PV[:, :16] & 0x0F) | ((codes_PV[:, 16:] & 0x0F) << 4)
    if "high" in (blocks.dtype.names or ()):
        bits_PV = (codes_PV >> 4).astype(np.uint32) << np.arange(32, dtype=np.uint32)
        blocks["high"] = bits_PV.sum(1, dtype=np.uint32)


# ---------------------------------------------------------------------------------------------------------- K types


def _k_blocks(values_RK: Floats, importance_K: Floats | None, kind: BlockType, levels: int) -> np.ndarray:
    """Q4_K and Q5_K: eight parts of 32 values, whose scales and offsets are codes of 6 bits."""
    values_BV = values_RK.reshape(-1, 256)
    values_PV = values_BV.reshape(-1, 32)
    if importance_K is None:
        mean_P1 = np.sqrt((values_PV**2).sum(1, keepdims=True) / np.float32(32))
        scales_P, offsets_P, codes_PV = fit_offset(values_PV, mean_P1 + np.abs(values_PV), levels, _WITHOUT[levels])
        (d_B, scales_BG), (m_B, offsets_BG) = (_by_largest(numbers_P.reshape(-1, 8)) for numbers_P in (scales_P, offsets_P))
    else:
        mean_B1 = np.float32(2) * (values_BV**2).sum(1, keepdims=True) / np.float32(256)
        importance_BV = np.broadcast_to(importance_K, values_RK.shape).reshape(-1, 256)
        weights_PV = (importance_BV * np.sqrt(mean_B1 + values_BV**2)).reshape(-1, 32)
        scales_P, offsets_P, codes_PV = fit_offset(values_PV, weights_PV, levels, _WITH_IMPORTANCE)
        weights_BG = weights_PV.sum(1).reshape(-1, 8)
        d_B, scales_BG = fit_positive(scales_P.reshape(-1, 8), weights_BG, 63)
        m_B, offsets_BG = fit_positive(offsets_P.reshape(-1, 8), weights_BG, 63)
    blocks = np.zeros(len(values_BV), kind.layout)
    blocks["d"], blocks["m"] = d_B, m_B
    blocks["scales"] = _packed_scales(scales_BG, offsets_BG)
    # codes again, for the scales as they are stored
    scale_P1 = (blocks["d"].astype(np.float32)[:, None] * scales_BG.astype(np.float32)).reshape(-1, 1)
    offset_P1 = (blocks["m"].astype(np.float32)[:, None] * offsets_BG.astype(np.float32)).reshape(-1, 1)
    is_there_P1 = scale_P1 != 0
    again_PV = np.rint((values_PV + offset_P1) / np.where(is_there_P1, scale_P1, np.float32(1)))
    codes_PV = np.where(is_there_P1, np.clip(again_PV, 0, levels), codes_PV).astype(np.uint8)
    runs = codes_PV.reshape(-1, 4, 2, 32)
    blocks["q"] = ((runs[:, :, 0] & 0x0F) | ((runs[:, :, 1] & 0x0F) << 4)).reshape(-1, 128)
    if levels > 15:
        parts = codes_PV.reshape(-1, 8, 32) >> 4
        blocks["high"] = (parts << np.arange(8, dtype=np.uint8)[None, :, None]).sum(1, dtype=np.uint8)
    return blocks


def _by_largest(numbers_BG: Floats) -> tuple[Floats, Whole]:
    """Numbers of at least 0 as codes of 6 bits, of which the largest is 63."""
    most_B1 = numbers_BG.max(1, keepdims=True)
    inverse_B1 = np.divide(np.float32(63), most_B1, out=np.zeros_like(most_B1), where=most_B1 > 0)
    return most_B1[:, 0] / np.float32(63), np.minimum(np.rint(inverse_B1 * numbers_BG), 63).astype(np.int32)


def _packed_scales(scales_BG: Whole, offsets_BG: Whole) -> NDArray[np.uint8]:
    """Eight scales and eight offsets of 6 bits in 12 bytes: `gguf_blocks` unpacks them."""
    first, second = scales_BG[:, :4] | ((scales_BG[:, 4:] >> 4) << 6), offsets_BG[:, :4] | ((offsets_BG[:, 4:] >> 4) << 6)
    rest = (scales_BG[:, 4:] & 0x0F) | ((offsets_BG[:, 4:] & 0x0F) << 4)
    return np.concatenate((first, second, rest), axis=1).astype(np.uint8)


def _q6_k_blocks(values_RK: Floats, importance_K: Floats | None, kind: BlockType) -> np.ndarray:
    """Q6_K: sixteen parts of 16 values, whose scales are codes of 8 bits."""
    values_PV = values_RK.reshape(-1, 16)
    if importance_K is None:
        weights_PV = values_PV**2
    else:
        weights_PV = np.broadcast_to(importance_K, values_RK.shape).reshape(-1, 16)
    scales_P, codes_PV = fit_signed(values_PV, weights_PV, 32)
    scales_BG = scales_P.reshape(-1, 16)
    largest_B1 = np.take_along_axis(scales_BG, np.abs(scales_BG).argmax(1)[:, None], 1)
    is_there_B1 = np.abs(largest_B1) >= _NOTHING
    inverse_B1 = np.float32(-128) / np.where(is_there_B1, largest_B1, np.float32(1))
    blocks = np.zeros(len(scales_BG), kind.layout)
    blocks["d"] = np.where(is_there_B1, 1 / inverse_B1, 0)[:, 0]
    coded_BG = np.where(is_there_B1, np.minimum(np.rint(inverse_B1 * scales_BG), 127), 0)
    blocks["scales"] = coded_BG
    scale_P1 = (blocks["d"].astype(np.float32)[:, None] * coded_BG.astype(np.float32)).reshape(-1, 1)
    has_scale_P1 = scale_P1 != 0
    again_PV = np.clip(np.rint(values_PV / np.where(has_scale_P1, scale_P1, np.float32(1))), -32, 31)
    is_block_P1 = np.repeat(is_there_B1, 16, axis=0)
    codes_PV = np.where(is_block_P1, np.where(has_scale_P1, again_PV, codes_PV) + 32, 0).astype(np.uint8)
    # of each half of 128 values, runs of 32: low halves of two in a byte, the upper two bits of four
    runs = codes_PV.reshape(-1, 2, 4, 32)
    blocks["q"] = ((runs[:, :, :2] & 0x0F) | ((runs[:, :, 2:] & 0x0F) << 4)).reshape(-1, 128)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
    blocks["high"] = ((runs >> 4) << shifts).sum(2, dtype=np.uint8).reshape(-1, 64)
    return blocks


_Encoder = Callable[[Floats, Floats | None, BlockType], np.ndarray]

#: Types that are encoded here, with and without importance.
_K_TYPES: dict[str, _Encoder] = {
    "Q4_K": lambda values, importance, kind: _k_blocks(values, importance, kind, 15),
    "Q5_K": lambda values, importance, kind: _k_blocks(values, importance, kind, 31),
    "Q6_K": _q6_k_blocks,
}
#: Types of 32 values, encoded here where there is an importance; the `gguf` package does it without.
_WEIGHTED: dict[str, Callable[[Floats, Floats, BlockType], np.ndarray]] = {
    "Q4_0": lambda values, importance, kind: _signed_blocks(values, importance, kind, 8),
    "Q5_0": lambda values, importance, kind: _signed_blocks(values, importance, kind, 16),
    "Q4_1": lambda values, importance, kind: _offset_blocks(values, importance, kind, 15),
    "Q5_1": lambda values, importance, kind: _offset_blocks(values, importance, kind, 31),
}


def takes_importance(kind: str) -> bool:
    """Whether a type's codes depend on the inputs' importance: all but Q8_0's, which has enough bits."""
    return kind in _K_TYPES or kind in _WEIGHTED


def quantise_rows(rows_RK: Floats, kind: str, importance_K: Floats | None = None) -> NDArray[np.uint8]:
    """Rows of weights as blocks of a type, (R, bytes of a row), on all cores.

    importance_K: what each input weighs, at least 0, on average over the calibration text. Rows are whole numbers of blocks.
    """
    block, inputs = _BY_NAME[kind], rows_RK.shape[1]
    assert inputs % block.values == 0, (kind, inputs)
    out = np.empty((len(rows_RK), inputs // block.values * block.bytes), np.uint8)
    step = max(1, _VALUES_AT_ONCE // inputs)

    def encode_some(start: int) -> None:
        some = np.ascontiguousarray(rows_RK[start : start + step], np.float32)
        out[start : start + step] = _encoded(some, kind, importance_K, block).view(np.uint8).reshape(len(some), -1)

    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(encode_some, range(0, len(rows_RK), step)):
            pass
    return out


def _encoded(values_RK: Floats, kind: str, importance_K: Floats | None, block: BlockType) -> np.ndarray:
    if kind in _K_TYPES:
        return _K_TYPES[kind](values_RK, importance_K, block)
    if importance_K is not None and kind in _WEIGHTED:
        return _WEIGHTED[kind](values_RK, importance_K, block)
    import gguf

    encoded: np.ndarray = gguf.quants.quantize(values_RK, gguf.GGMLQuantizationType[kind])
    return encoded
