"""Memory of packed weights, in large pages where the system has them.

A step reads every weight once, and finds the place of each page of 4 KB in tables first; on a virtual machine in two. Pages of
2 MB need a five-hundredth of that, and the processor reads ahead within a page alone. Linux gives them to memory that asks
for them (`madvise`, MADV_HUGEPAGE) and lies at a multiple of their size.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading

import torch
from torch import Tensor

#: Bytes of a large page, of an allocation, and that a tensor starts at a multiple of.
PAGE, CHUNK, ALIGNMENT = 1 << 21, 1 << 26, 64


class _Chunk:
    """Memory that tensors are cut from, one after the other. It lives as long as any of them."""

    def __init__(self, size: int) -> None:
        # room to begin at a multiple of the page; pages that nothing is written to cost nothing
        self._memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._next = -address % PAGE
        self._end = self._next + size
        try:
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            # a system that has none
            pass

    def cut(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A tensor of zeros, or None where it does not fit."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if self._next + size > self._end:
            return None
        tensor = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=self._next)
        self._next += -(-size // ALIGNMENT) * ALIGNMENT
        return tensor.view(shape)


class _Memory(threading.local):
    """The chunk that a thread cuts from now."""

    chunk: _Chunk | None = None


_MEMORY = _Memory()


def weight_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros for weights that stay as long as a model is open: tensors of one chunk are given back together."""
    size = math.prod(shape) * dtype.itemsize
    if not size or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    found = _MEMORY.chunk.cut(shape, dtype) if _MEMORY.chunk else None
    if found is None:
        _MEMORY.chunk = _Chunk(max(CHUNK, -(-size // PAGE) * PAGE))
        found = _MEMORY.chunk.cut(shape, dtype)
        assert found is not None, "a new chunk has room"
    return found
