"""Compiled CPU kernels over logits: cross-entropy with its gradient in place, and sampling (cross_entropy.h, draw.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.model import cpu_kernels as operators
from bessemer.model.cpu_kernels import library, raise_failure

# Shapes: N tokens, V vocabulary.


def cross_entropy_(
    logits_NV: Tensor, targets_N: Tensor, *, z_loss: float = 0.0, wants_gradient: bool = True, threads: int | None = None
) -> tuple[Tensor, Tensor]:
    """log Σ exp(logits) of each token, and log p − log(1 − p) of its target, (N,) float32, from bfloat16 logits in float32.

    wants_gradient: overwrite the logits with the gradient, by them, of the sum of −log p + z_loss · (log Σ exp)². threads:
    PyTorch's number of them when None; a row's numbers do not depend on it. Raises ValueError for a target that is not in the
    vocabulary.
    """
    assert library() is not None, "ask library() first"
    try:
        return operators.cross_entropy_(logits_NV, targets_N, z_loss, wants_gradient, threads or torch.get_num_threads())
    except RuntimeError as error:
        raise operators.thrown(error) from error


# Shapes: R rows, V vocabulary.


class DrawsFields(ctypes.Structure):
    """`struct Draws` of draw.h."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("temperatures", ctypes.c_void_p),
        ("uniforms", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("log_probs", ctypes.c_void_p),
    )


def draw_tokens(
    logits_RV: Tensor, temperatures: Sequence[float], uniforms: Sequence[float], *, threads: int | None = None
) -> tuple[list[int], list[float]]:
    """Of each row the first token whose cumulative share of softmax(logits / temperature) exceeds the row's number in [0, 1),
    never one of probability 0; and its log-probability, in nats. At temperature 0 the largest (the first of equals), and 0.

    logits_RV: float32, on the host. -1 where a row's logits are NaN or ∞, or all -∞. threads: PyTorch's number of them when
    None; a row's token depends on it as little as on the rows beside it.
    """
    kernels = library()
    assert kernels is not None, "ask library() first"
    logits_RV = logits_RV.contiguous()
    rows, vocabulary = logits_RV.shape
    temperatures_R = torch.tensor(temperatures, dtype=torch.float32)
    uniforms_R = torch.tensor(uniforms, dtype=torch.float64)
    tokens_R, log_probs_R = torch.empty(rows, dtype=torch.int32), torch.empty(rows)
    assert logits_RV.dtype == torch.float32 and len(temperatures_R) == len(uniforms_R) == rows
    addresses = (tensor.data_ptr() for tensor in (logits_RV, temperatures_R, uniforms_R, tokens_R, log_probs_R))
    fields = DrawsFields(rows, vocabulary, *addresses)
    raise_failure(kernels.bessemer_draw(ctypes.byref(fields), threads or torch.get_num_threads()))
    return tokens_R.tolist(), log_probs_R.tolist()
