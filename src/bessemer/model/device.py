"""The device of a `device` setting, and what it can compute in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from bessemer.core.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:N` or `mps`; `auto` is the first of cuda, mps and cpu that this machine has.

    Raises ConfigError for another name, and for a device that is not here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in available.items() if here))
    kind, _, index = name.partition(":")
    if kind not in available or (index and not index.isdigit()):
        raise ConfigError(f"unknown device {name!r}; known: auto, {', '.join(available)}")
    if not available[kind] or (index and kind == "cuda" and int(index) >= torch.cuda.device_count()):
        raise ConfigError(f"device {name!r} is not on this machine; 'auto' takes what there is")
    return torch.device(name)


def product_cost(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a matrix product in `dtype` over those of the same in float32 (1: as fast, 0.5: twice as fast).

    On a processor both are measured, once in a process: PyTorch has a fast product where the processor has instructions for it,
    and a scalar loop, up to two hundred times slower, elsewhere. Names of instruction sets do not tell: libraries may be held
    to fewer. On a GPU 16 bits are faster where its generation computes in them.
    """
    if dtype == torch.float32:
        return 1.0
    if device.type == "cuda":
        fast = dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
        return 0.5 if fast else 2.0
    if device.type != "cpu":
        return 2.0
    # on one thread: on a busy processor several wait for each other, for up to a hundred times as long as they compute
    return _product_seconds(dtype, 1) / _product_seconds(torch.float32, 1)


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products in `dtype` take no longer than in float32 on a device (`product_cost`)."""
    return product_cost(dtype, device) <= 1.0


def served_dtype(setting: str, own: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a model in `own` is served: that of the setting; for `auto` the model's own, of float32 bfloat16 on a
    GPU that multiplies faster in it."""
    if setting != "auto":
        return getattr(torch, setting)  # type: ignore[no-any-return]
    is_slow = device.type == "cuda" and own == torch.float32 and product_cost(torch.bfloat16, device) < 1
    return torch.bfloat16 if is_slow else own


def check_dtype(dtype: str, device: torch.device) -> None:
    """Raise ConfigError when a dtype that the settings name makes matmuls much slower than float32's on this device."""
    if dtype == "auto":
        return
    cost = product_cost(getattr(torch, dtype), device)
    if cost > _SLOWEST:
        raise ConfigError(
            f"dtype: {dtype}: this processor has no instructions for it, and a matmul takes {cost:,.0f} times as long as in "
            "float32; set dtype: float32, or auto, which takes the faster one (a recipe.lock.yaml that says it was measured on "
            "another machine: delete the stage's entry)"
        )


def product_flops(dtype: torch.dtype) -> float:
    """FLOP/s of matrix products in `dtype` on the processor, with PyTorch's threads."""
    return 2 * _SIDE**3 / _product_seconds(dtype)


@contextmanager
def with_threads(number: int | None) -> Iterator[None]:
    """While entered, PyTorch computes with a number of threads in this process; None: as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


#: A configured dtype is refused whose matmul takes more than this many times as long as that of float32.
_SLOWEST = 2.0
#: Measured matmul: side of its matrices, repetitions, and the seconds after which it is not repeated.
_SIDE, _REPETITIONS, _ENOUGH_SECONDS = 256, 7, 0.05


@cache
def _product_seconds(dtype: torch.dtype, threads: int | None = None) -> float:
    """Seconds of the fastest of several products of square matrices on the processor. threads: None, PyTorch's."""
    left, right = (torch.full((_SIDE, _SIDE), 0.5, dtype=dtype) for _ in range(2))
    times: list[float] = []
    with with_threads(threads):
        # warm-up: allocates, and starts the threads
        while len(times) < 2 or (len(times) <= _REPETITIONS and sum(times) < _ENOUGH_SECONDS):
            start = time.perf_counter()
            torch.mm(left, right)
            times.append(time.perf_counter() - start)
    return min(times[1:])


#: Products of a chain that is timed on a device beside the processor.
_CHAIN = 32


def slower_than_processor(
    device: torch.device,
    rows: int,
    width: int,
    dtype: torch.dtype,
    seconds: Callable[[torch.device, int, int, torch.dtype], float] | None = None,
) -> str | None:
    """A line that says that a Mac's GPU takes longer than its processor for a chain of products of a model; None where it does
    not, and on other devices.

    A product of few rows is sooner computed by the processor than handed to the GPU. rows: tokens of a step. width: channels of
    the model. seconds: of a chain of products; None: measured.
    """
    if device.type != "mps":
        return None
    seconds, processor = seconds or _chain_seconds, torch.device("cpu")
    own = seconds(device, rows, width, dtype)
    other = seconds(processor, rows, width, dtype if is_fast(dtype, processor) else torch.float32)
    if own <= other:
        return None
    return (
        f"  slow: this machine's GPU (mps) takes {own / other:.1f} times as long as its processor for {rows:,} rows of this "
        f"model's width ({width:,}); take --device cpu"
    )


def _chain_seconds(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> float:
    """Seconds of the faster of two chains of products, each of the result of the one before."""
    hidden = torch.ones(rows, width, device=device, dtype=dtype)
    weight = torch.full((width, width), 1 / width, device=device, dtype=dtype)
    times = []
    for _ in range(3):
        start, product = time.perf_counter(), hidden
        for _ in range(_CHAIN):
            product = product @ weight
        # a number on the host waits for the device
        float(product[0, 0])
        times.append(time.perf_counter() - start)
    return min(times[1:])


def widest_float(device: torch.device) -> torch.dtype:
    """The widest floating-point dtype of a device: float64, and float32 on MPS, which refuses to hold a float64 tensor."""
    return torch.float32 if device.type == "mps" else torch.float64


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64: where it lies, or on the CPU where its device has no float64. Itself when it is float64."""
    if widest_float(tensor.device) != torch.float64:
        # moved first: a tensor is converted before it is copied to another device
        tensor = tensor.cpu()
    return tensor.to(torch.float64)
