"""Loads every library of the installed `bessemer-kernels` that this processor can run: what CI runs on each wheel.

Bessemer is not needed: PyTorch is loaded first, as it does, and a library says its arithmetic and the size of a matrix.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

import bessemer_kernels
import torch

FOLDER = Path(__file__).parents[1] / "src" / "bessemer" / "model" / "cpu_kernels"
spec = importlib.util.spec_from_file_location("bessemer_prebuilt", FOLDER / "prebuilt.py")
prebuilt = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = prebuilt
spec.loader.exec_module(prebuilt)

# the operators that the kernels compute, as Bessemer defines them
library = torch.library.Library("bessemer", "DEF")
library.define("pointwise(Tensor x, int function, int threads) -> Tensor")

assert prebuilt.sources_hash(FOLDER) == bessemer_kernels.SOURCES, "the wheel was built from other sources"
assert set(bessemer_kernels.LIBRARIES) == {tier.name for tier in prebuilt.tiers(prebuilt.machine())}, "a tier is missing"
sizes = set()
for tier in prebuilt.tiers(prebuilt.machine()):
    if not tier.needs <= prebuilt.features():
        print(f"{tier.name}: not for this processor")
        continue
    kernels = ctypes.CDLL(str(bessemer_kernels.LIBRARIES[tier.name]))
    kernels.bessemer_arithmetic.restype = ctypes.c_char_p
    kernels.bessemer_matrix_size.restype = ctypes.c_int64
    kernels.bessemer_operators(1)
    assert torch.equal(torch.ops.bessemer.pointwise(torch.zeros(3), 0, 1), torch.zeros(3)), "SiLU of zero is zero"
    kernels.bessemer_operators(0)
    sizes.add(kernels.bessemer_matrix_size())
    print(f"{tier.name}: {kernels.bessemer_arithmetic().decode()}")
assert len(sizes) == 1, sizes
