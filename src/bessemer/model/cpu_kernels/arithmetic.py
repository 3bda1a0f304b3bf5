"""The arithmetic of the compiled CPU kernels on this processor, in words."""

from __future__ import annotations

from bessemer.model.cpu_kernels.build import arithmetic

_NAMES = {"avx512": "AVX-512 VNNI", "avx2": "AVX2", "portable": "portable C++"}


def kernels_arithmetic() -> str:
    """What the compiled kernels compute with. They are there: ask `library` first."""
    return _NAMES[arithmetic()]
