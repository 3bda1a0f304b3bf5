"""The numbers that a step needs on the device: laid out in one buffer on the host, and copied at once.

A copy to a GPU costs the host the same for four bytes as for thousands, and one from memory that is not pinned waits for the
device. So each part of a step puts its numbers here first, all are copied together, and the tensors that it was given are
views of the copy.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

#: Bytes of a buffer, and what each array's place in it is a multiple of.
_BUFFER_BYTES = 1 << 20
_ALIGNED = 16

_NUMPY_TYPES = {
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bool: np.bool_,
}


class StepInputs:
    """`begin`, `put` and `copy`, in this order, once a step.

    The tensors that `put` gives hold their numbers from `copy` on, until the next `copy`. The same puts after `begin` give the
    same memory, which captured steps rely on. A step whose numbers are more than a buffer holds takes further buffers, each
    copied at once. On a processor the buffer is the device's memory too, and nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [_Buffer(_BUFFER_BYTES, device)]
        self._current = 0

    def begin(self) -> None:
        """Forget what was put. Waits where the host's memory is still being copied: it is written in turns."""
        for buffer in self._buffers[: self._current + 1]:
            buffer.begin()
        self._current = 0

    def put(self, numbers: ArrayLike, dtype: torch.dtype = torch.int64) -> Tensor:
        """A tensor on the device for some numbers, of their shape."""
        array: NDArray[np.generic] = np.asarray(numbers, _NUMPY_TYPES[dtype])
        host, tensor = self.reserve(array.shape, dtype)
        host[...] = array
        return tensor

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[NDArray[np.generic], Tensor]:
        """Memory on the host to write numbers into before the copy, with any content, and their tensor on the device."""
        size = prod(shape) * dtype.itemsize
        while not self._buffers[self._current].has_room(size):
            self._current += 1
            if self._current == len(self._buffers):
                self._buffers.append(_Buffer(max(size, _BUFFER_BYTES), self._device))
            self._buffers[self._current].begin()
        return self._buffers[self._current].reserve(shape, dtype, size)

    def copy(self) -> None:
        """Copy what was put. The host does not wait for it."""
        for buffer in self._buffers[: self._current + 1]:
            buffer.copy()


class _Buffer:
    """Memory that is copied at once: on the device, and twice on the host, so that a step's numbers are written while those of
    the step before wait to be copied."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._used, self._turn = size, 0, 0
        if device.type == "cpu":
            self._numbers: list[NDArray[np.generic]] = [np.zeros(size, np.uint8)]
            self._memory = torch.from_numpy(self._numbers[0])
            self._host = [self._memory]
        else:
            hosts = [host_memory(size, device) for _ in range(2)]
            self._numbers = [numbers for numbers, _ in hosts]
            self._host = [memory for _, memory in hosts]
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._copied = [torch.cuda.Event() for _ in self._host] if device.type == "cuda" else []

    def begin(self) -> None:
        self._turn = (self._turn + 1) % len(self._host)
        self._used = 0
        if self._copied:
            self._copied[self._turn].synchronize()

    def has_room(self, size: int) -> bool:
        return self._used + size <= self._size

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> tuple[NDArray[np.generic], Tensor]:
        first, end = self._used, self._used + size
        self._used = min(self._size, end + -end % _ALIGNED)
        host: NDArray[np.generic] = self._numbers[self._turn][first:end].view(_NUMPY_TYPES[dtype]).reshape(shape)
        if self._memory is self._host[0]:
            return host, torch.from_numpy(host)
        return host, self._memory[first:end].view(dtype).view(shape)

    def copy(self) -> None:
        if self._memory is self._host[0]:
            return
        self._memory[: self._used].copy_(self._host[self._turn][: self._used], non_blocking=bool(self._copied))
        if self._copied:
            self._copied[self._turn].record()


class TokensToHost:
    """Sampled tokens on their way to the host, which does not wait until it reads them."""

    def __init__(self, tokens_R: Tensor) -> None:
        """tokens_R: int64. Not to be written before they are read."""
        self._copied = None
        self._tokens_R = tokens_R
        if tokens_R.device.type != "cpu":
            is_cuda = tokens_R.device.type == "cuda"
            self._tokens_R = host_memory(tokens_R.nbytes, tokens_R.device)[1].view(torch.int64)
            self._tokens_R.copy_(tokens_R, non_blocking=is_cuda)
            if is_cuda:
                self._copied = torch.cuda.Event()
                self._copied.record()

    def read(self) -> list[int]:
        """The tokens. Waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tokens_R.tolist()


def fill_pending(tokens_N: Tensor, pending_2P: Tensor | None, sampled_R: Tensor) -> None:
    """Write tokens of the step before, which the host does not know, over their placeholders.

    pending_2P: the places of placeholders, and the places of their tokens among those sampled; None: there are none.
    """
    if pending_2P is not None:
        rows_P, places_P = pending_2P
        # a row that gave no token has a number below 0; what follows it is thrown away
        tokens_N.index_copy_(0, rows_P, sampled_R[places_P].clamp(min=0).to(tokens_N.dtype))


def host_memory(size: int, device: torch.device) -> tuple[NDArray[np.generic], Tensor]:
    """Bytes on the host, as an array and as a tensor; pinned for a GPU, which then copies beside what the host goes on with."""
    memory = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return memory.numpy(), memory
