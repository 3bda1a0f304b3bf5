import numpy as np
import pytest
import torch

from bessemer.core.errors import asked_memory


@pytest.mark.parametrize(
    ("error", "bytes_asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total of 79 GiB"), 21495808),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 2 << 30),
        (torch.OutOfMemoryError("HIP out of memory. Tried to allocate 512 bytes"), 0),
        (RuntimeError("std::bad_alloc"), 0),
        (MemoryError(), 0),
        (RuntimeError("shapes do not match"), None),
        (ValueError("out of memory"), None),
    ],
)  # fmt: skip
def test_the_amount_is_read_from_what_libraries_say(error, bytes_asked):
    assert asked_memory(error) == bytes_asked


def test_real_refusals_are_known():
    for allocate in (lambda: torch.empty(1 << 58), lambda: np.empty(1 << 57)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert asked_memory(caught.value) > 1 << 59


def test_the_cause_is_looked_at_too():
    try:
        try:
            raise MemoryError("Unable to allocate 8.00 KiB for an array")
        except MemoryError as error:
            raise ValueError("a layer failed") from error
    except ValueError as error:
        assert asked_memory(error) == 8192
