"""Paged attention by the compiled CPU kernels; see attention.h."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.model import cpu_kernels as operators
from bessemer.model.cpu_kernels import library
from bessemer.model.layers.attention_backends import Scores

# Shapes: N new tokens, S sequences, P blocks, K key-value heads, M positions of a block, H query heads, C channels of a key,
# V of a value.

#: Types of pages, as in attention.h. Bytes hold two codes of 4 bits each.
PAGE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.uint8: 4}


class PagesFields(ctypes.Structure):
    """`struct Pages` of attention.h."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
        ("kv_heads", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("key_width", ctypes.c_int64),
        ("value_width", ctypes.c_int64),
        ("value_stride", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


class ScoresFields(ctypes.Structure):
    """`struct Scores` of attention.h."""

    _fields_ = (
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("sinks", ctypes.c_void_p),
    )


def pages_fields(
    keys_PKMC: Tensor, values_PKMV: Tensor, key_scales_PKM: Tensor | None, value_scales_PKM: Tensor | None
) -> PagesFields:
    """A layer's pages as a C struct, valid while the tensors live. values_PKMV may be a slice of keys_PKMC's channels."""
    assert keys_PKMC.is_contiguous() and values_PKMV.stride(-1) == 1, "pages lie in order"
    blocks, heads, block_size, key_width = keys_PKMC.shape
    each = 2 if keys_PKMC.dtype == torch.uint8 else 1
    scales = [None if part is None else part.data_ptr() for part in (key_scales_PKM, value_scales_PKM)]
    return PagesFields(
        keys_PKMC.data_ptr(),
        values_PKMV.data_ptr(),
        *scales,
        heads,
        block_size,
        key_width * each,
        values_PKMV.shape[-1] * each,
        values_PKMV.stride(-2) * each,
        blocks,
        PAGE_TYPES[keys_PKMC.dtype],
    )


def scores_fields(scores: Scores, window: int | None) -> ScoresFields:
    """`Scores` as a C struct, valid while the float32 sinks live."""
    sinks = None if scores.sinks_H is None else scores.sinks_H.data_ptr()
    assert scores.sinks_H is None or scores.sinks_H.dtype == torch.float32
    return ScoresFields(scores.scale, scores.softcap or 0.0, window or 0, sinks)


class PageTensors(NamedTuple):
    """A layer's pages. values may be a slice of the keys' channels; scales are there for pages in int8, and in uint8 (two codes
    of 4 bits to a byte)."""

    keys_PKMC: Tensor
    values_PKMV: Tensor
    key_scales_PKM: Tensor | None = None
    value_scales_PKM: Tensor | None = None


class PagedSequences(NamedTuple):
    """New tokens of several sequences over pages: what attention, and the writing of keys, need to know of a batch.

    starts: int64, sequence s has the rows starts[s] : starts[s + 1]. positions: int32, of each row. tables: int32, (S, blocks),
    the block of each `block_size` positions, -1 where no row may see it.
    """

    starts: Tensor
    positions: Tensor
    tables: Tensor

    @classmethod
    def of(cls, starts: Sequence[int], positions: Sequence[int], tables: array[int], table_width: int) -> PagedSequences:
        """tables: for every sequence `table_width` numbers."""
        return cls(
            torch.tensor(starts, dtype=torch.int64),
            torch.tensor(positions, dtype=torch.int32),
            torch.frombuffer(tables, dtype=torch.int32).view(-1, table_width),
        )


def paged_attention(
    query_NHC: Tensor,
    pages: PageTensors,
    batch: PagedSequences,
    scores: Scores,
    window: int | None = None,
    threads: int | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v of every new token over the positions of its sequence up to its own, (N, H, V) float32.

    The new tokens' keys and values are in the pages already (`write_pages`). A row's result has the same bits whatever other
    rows there are, in whatever blocks its keys lie, and with any number of threads (PyTorch's where None). Scores and sums are
    float32. Raises ValueError for a shape that does not fit the pages, and for a position or a page that is not there.
    """
    assert library() is not None, "ask library() first"
    sinks_H = scores.sinks_H
    try:
        return operators.paged_attention(
            query_NHC,
            *pages,
            *batch,
            None if sinks_H is None else sinks_H.detach().float().contiguous(),
            scores.scale,
            scores.softcap or 0.0,
            window or 0,
            threads or torch.get_num_threads(),
        )
    except RuntimeError as error:
        raise operators.thrown(error) from error


def write_pages(pages: PageTensors, batch: PagedSequences, key_NKC: Tensor, value_NKV: Tensor | None) -> None:
    """Put keys and values of new tokens into their pages; value_NKV is None where values are channels of the keys. Raises
    ValueError for a position or a page that is not there."""
    assert library() is not None, "ask library() first"
    # values that are channels of the keys are written with them
    values = (None, None) if value_NKV is None else (pages.values_PKMV, pages.value_scales_PKM)
    try:
        operators.write_pages(pages.keys_PKMC, values[0], pages.key_scales_PKM, values[1], *batch, key_NKC, value_NKV)
    except RuntimeError as error:
        raise operators.thrown(error) from error
