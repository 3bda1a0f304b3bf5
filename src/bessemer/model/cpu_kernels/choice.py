"""Whether the kernels or PyTorch multiply faster on this processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from statistics import median

import torch
from torch import Tensor

from bessemer.model.cpu_kernels.build import arithmetic
from bessemer.model.cpu_kernels.packed import PackedMatrix
from bessemer.model.decoded_products import product
from bessemer.model.quantisation.schemes.int8 import Int8
from bessemer.model.quantised_linear import QuantisedLinear

#: Outputs and inputs of the matrix that is tried, too large for a cache.
_SIZE = 4096
_TRIALS = 5


@cache
def faster_dtype() -> torch.dtype | None:
    """The type of weights, float16 or float32, by which PyTorch multiplies a row sooner than the kernels do by codes of 8 bits;
    None where the kernels are faster.

    Measured once in a process, and only where the kernels are plain C++ or none: with instructions for products of bytes they
    are faster, and take less memory.
    """
    kind = arithmetic()
    if kind not in ("portable", "modules"):
        return None
    row_1K = torch.ones(1, _SIZE)
    seconds = {dtype: _seconds(partial(product, torch.zeros(_SIZE, _SIZE, dtype=dtype), None, row_1K)) for dtype in _DTYPES}
    best = min(_DTYPES, key=lambda dtype: seconds[dtype])
    if kind == "modules":
        return best
    matrix = PackedMatrix.of(QuantisedLinear(_SIZE, _SIZE, Int8(32)))
    return best if seconds[best] < _seconds(partial(matrix.multiply, row_1K)) else None


_DTYPES = (torch.float16, torch.float32)


def _seconds(compute: Callable[[], Tensor]) -> float:
    trials = []
    for _ in range(_TRIALS + 1):
        start = time.perf_counter()
        compute()
        trials.append(time.perf_counter() - start)
    return median(trials[1:])
