"""The device of a `device` setting."""

from __future__ import annotations

import torch

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
