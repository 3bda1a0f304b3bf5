"""Memory of packed weights, in large pages where the system has them.

A step reads every weight once, and finds the place of each page of 4 KB in tables first; on a virtual machine in two. Pages of
2 MB need a five-hundredth of that, and the processor reads ahead within a page alone. Linux gives them to memory that asks
for them (`madvise`, MADV_HUGEPAGE) and lies at a multiple of their size.

What was packed is there twice for a time. Codes that were read to be packed lie in memory of their own, which goes back to the
system with them (the allocator keeps tensors of some megabytes for later ones); pages of a mapped file are dropped.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
from functools import cache
from pathlib import Path

import numpy as np
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


def passing_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros whose memory goes back to the system as soon as nothing holds it."""
    size = math.prod(shape) * dtype.itemsize
    if size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    found = _Chunk(-(-size // PAGE) * PAGE).cut(shape, dtype)
    assert found is not None, "a new chunk has room"
    return found


#: An entry of /proc/self/pagemap, bits 63 and 61: the page is in memory; it is a file's as the file has it, or shared.
_PAGEMAP, _PRESENT, _OF_FILE = Path("/proc/self/pagemap"), 1 << 63, 1 << 61
_DONTNEED = 4


def drop_mapped_pages(tensor: Tensor) -> int:
    """Drop the pages of a mapped file that a tensor lies on from this process's memory; they are read from the file again where
    they are looked at. Returns their bytes.

    Pages that were written to are no longer the file's, and stay; so does memory of no file. Nothing may write to the tensor
    meanwhile. Does nothing where the system does not say what a page is (other than Linux).
    """
    if tensor.device.type != "cpu" or not tensor.numel() or (advise := _madvise()) is None:
        return 0
    page, start = mmap.PAGESIZE, tensor.data_ptr()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first, last = start // page, -(-(start + extent * tensor.itemsize) // page)
    try:
        with _PAGEMAP.open("rb", buffering=0) as stream:
            stream.seek(first * 8)
            entries = np.frombuffer(stream.read((last - first) * 8), np.uint64)
    except OSError:
        return 0
    wanted = np.uint64(_PRESENT | _OF_FILE)
    droppable = np.concatenate(([False], entries & wanted == wanted, [False]))
    edges = np.flatnonzero(droppable[1:] != droppable[:-1]).reshape(-1, 2)
    for begin, end in edges.tolist():
        advise((first + begin) * page, (end - begin) * page, _DONTNEED)
    return int((edges[:, 1] - edges[:, 0]).sum()) * page


@cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux" or not _PAGEMAP.exists():
        return None
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes, advise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return advise
