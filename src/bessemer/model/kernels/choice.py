"""Whether the kernels or PyTorch multiply faster on this processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from bessemer.model.kernels.build import arithmetic
from bessemer.model.kernels.packed import PackedMatrix
from bessemer.model.quantised_linear import QuantisedLinear, Scheme

#: Outputs and inputs of the matrix that is tried, too large for a cache once its weights are decoded.
_SIZE = 4096
_TRIALS = 5


@cache
def decoded_is_faster() -> bool:
    """Whether PyTorch multiplies a row by float32 weights sooner than the kernels do by their codes of 8 bits.

    Measured once in a process, and only where the kernels are plain C++ or none: with instructions for products of bytes they
    are faster, and take a quarter of the memory.
    """
    if arithmetic() == "modules":
        return True
    if arithmetic() != "portable":
        return False
    matrix = PackedMatrix.of(QuantisedLinear(_SIZE, _SIZE, Scheme(8, 32)))
    weight_NK, row_1K = torch.zeros(_SIZE, _SIZE), torch.ones(1, _SIZE)
    return _seconds(lambda: functional.linear(row_1K, weight_NK)) < _seconds(lambda: matrix.multiply(row_1K))


def _seconds(product: Callable[[], Tensor]) -> float:
    trials = []
    for _ in range(_TRIALS + 1):
        start = time.perf_counter()
        product()
        trials.append(time.perf_counter() - start)
    return median(trials[1:])
