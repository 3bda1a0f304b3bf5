"""The compiled CPU kernels as PyTorch's operators: schemas, and shapes of what they return.

operators.cpp computes them, registered from C++, so that a call costs about as much as one of PyTorch's own. None has a
derivative: products and attention serve, and `cross_entropy_` gives the gradient itself.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

# Shapes: M rows, N outputs, K inputs, H query heads, V channels of a value.

_LIBRARY = torch.library.Library("bessemer", "DEF")
_BATCH = "Tensor starts, Tensor positions, Tensor tables"

for _schema in (
    "packed_linear(Tensor x, Tensor codes, Tensor? scales, Tensor? zeros, Tensor? offsets, Tensor? bias, "
    "int kind, int outputs, int inputs, int group, int threads) -> Tensor",
    f"paged_attention(Tensor query, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, {_BATCH}, "
    "Tensor? sinks, float scale, float softcap, int window, int threads) -> Tensor",
    "write_pages(Tensor(a!) keys, Tensor(b!)? values, Tensor(c!)? key_scales, Tensor(d!)? value_scales, "
    f"{_BATCH}, Tensor key, Tensor? value) -> ()",
    "cross_entropy_(Tensor(a!) logits, Tensor targets, float z_loss, bool wants_gradient, int threads) -> (Tensor, Tensor)",
):
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("bessemer::packed_linear", lib=_LIBRARY)
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    *how: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], how[1])


@torch.library.register_fake("bessemer::paged_attention", lib=_LIBRARY)
def _(query: Tensor, keys: Tensor, values: Tensor, *others: object) -> Tensor:
    return query.new_empty(*query.shape[:-1], values.shape[-1], dtype=torch.float32)


@torch.library.register_fake("bessemer::write_pages", lib=_LIBRARY)
def _(*arguments: object) -> None:
    return None


@torch.library.register_fake("bessemer::cross_entropy_", lib=_LIBRARY)
def _(logits: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32)


packed_linear = torch.ops.bessemer.packed_linear.default
paged_attention = torch.ops.bessemer.paged_attention.default
write_pages = torch.ops.bessemer.write_pages.default
cross_entropy_ = torch.ops.bessemer.cross_entropy_.default


def thrown(error: RuntimeError) -> Exception:
    """What the C++ of an operator threw, a ValueError or a MemoryError: some builds of PyTorch make a RuntimeError of both."""
    return (MemoryError if "bad_alloc" in str(error) else ValueError)(str(error))


_computing: list[ctypes.CDLL] = []


def compute_by(kernels: ctypes.CDLL) -> None:
    """Let these kernels compute the operators from now on."""
    for before in _computing:
        before.bessemer_operators(0)
    _computing[:] = [kernels]
    kernels.bessemer_operators(1)
