"""Codes of 4 bits two a byte, and codes in words of 32 bits, as compressed-tensors has them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Shapes: N outputs, K inputs, G groups of a row, P bytes of a row.


def pack(codes: Tensor) -> Tensor:
    """Codes 0 … 15, uint8 (…, K), two a byte: the even ones in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The codes of `pack`, uint8 (…, K)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def words_of_bytes(packed_NP: Tensor) -> Tensor:
    """Bytes as int32, four each; the first is in the lowest bits."""
    # by way of one dimension: a dimension of one element may have any stride, and a view as int32 asks for some
    return packed_NP.reshape(-1).view(torch.int32).view(packed_NP.shape[0], -1)


def bytes_of_words(words: Tensor) -> Tensor:
    """The bytes of `words_of_bytes`."""
    return words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)


def words_of_int8(codes_NK: Tensor) -> Tensor:
    """int8 as int32, four each, counted from −128 and filled with zeros."""
    shifted = codes_NK.contiguous().view(torch.uint8) ^ 128
    return words_of_bytes(functional.pad(shifted, (0, -shifted.shape[-1] % 4)))


def int8_of_words(words: Tensor, inputs: int) -> Tensor:
    """The codes of `words_of_int8`."""
    return (bytes_of_words(words)[:, :inputs] ^ 128).contiguous().view(torch.int8)


def words_of_zeros(zeros_NG: Tensor) -> Tensor:
    """Zeros 0 … 15 as int32, eight rows each."""
    rows_GN = functional.pad(zeros_NG.T, (0, -zeros_NG.shape[0] % 8))
    return words_of_bytes(pack(rows_GN)).T.contiguous()


def zeros_of_words(words: Tensor, outputs: int) -> Tensor:
    """The zeros of `words_of_zeros`."""
    return unpack(bytes_of_words(words.T))[:, :outputs].T.contiguous()
