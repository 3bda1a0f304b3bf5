"""Cross-entropy of logits and its gradient in their place, by the compiled CPU kernels; see cross_entropy.h."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from bessemer.model.cpu_kernels.build import library, raise_failure

# Shapes: N tokens, V vocabulary.


class CrossEntropyFields(ctypes.Structure):
    """`struct CrossEntropy` of cross_entropy.h."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("log_sums", ctypes.c_void_p),
        ("log_odds", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("z_loss", ctypes.c_float),
        ("wants_gradient", ctypes.c_int32),
    )


def cross_entropy_(
    logits_NV: Tensor, targets_N: Tensor, *, z_loss: float = 0.0, wants_gradient: bool = True, threads: int | None = None
) -> tuple[Tensor, Tensor]:
    """log Σ exp(logits) of each token, and log p − log(1 − p) of its target, (N,) float32, from bfloat16 logits in float32.

    wants_gradient: overwrite the logits with the gradient, by them, of the sum of −log p + z_loss · (log Σ exp)². threads:
    PyTorch's number of them when None; a row's numbers do not depend on it. Raises ValueError for a target that is not in the
    vocabulary.
    """
    kernels = library()
    assert kernels is not None, "ask library() first"
    assert logits_NV.dtype == torch.bfloat16 and logits_NV.is_contiguous() and logits_NV.device.type == "cpu"
    targets_N = targets_N.to(torch.int64).contiguous()
    log_sums_N, log_odds_N = logits_NV.new_empty(2, len(logits_NV), dtype=torch.float32)
    fields = CrossEntropyFields(
        logits_NV.data_ptr(),
        targets_N.data_ptr(),
        log_sums_N.data_ptr(),
        log_odds_N.data_ptr(),
        *logits_NV.shape,
        z_loss,
        wants_gradient,
    )
    raise_failure(kernels.bessemer_cross_entropy(ctypes.byref(fields), threads or torch.get_num_threads()))
    return log_sums_N, log_odds_N
