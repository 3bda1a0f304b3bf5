"""Cross-entropy of logits and its gradient in their place, by the compiled CPU kernels; see cross_entropy.h."""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.model.cpu_kernels import operators
from bessemer.model.cpu_kernels.build import library

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
