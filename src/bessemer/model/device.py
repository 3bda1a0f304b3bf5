"""The device of a `device` setting, and what it can compute in."""

from __future__ import annotations

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


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are made by instructions of their own there; elsewhere they are slower than in float32."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def widest_float(device: torch.device) -> torch.dtype:
    """The widest floating-point dtype of a device: float64, and float32 on MPS, which refuses to hold a float64 tensor."""
    return torch.float32 if device.type == "mps" else torch.float64


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64: where it lies, or on the CPU where its device has no float64. Itself when it is float64."""
    if widest_float(tensor.device) != torch.float64:
        # moved first: a tensor is converted before it is copied to another device
        tensor = tensor.cpu()
    return tensor.to(torch.float64)
