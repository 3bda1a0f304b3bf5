"""A device that calls itself MPS and refuses float64, as Apple's does. Its tensors keep their numbers on the CPU.

It finds a float64 tensor on the device, a tensor left behind on the CPU, and code that asks a device for what only a processor
has. It says nothing about kernels that MPS lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

#: With an index: to find the present one PyTorch would ask a backend that is not there.
MPS = torch.device("mps", 0)
_aten = torch.ops.aten
#: Operations that take tensors of two devices, as PyTorch's do.
_ACROSS = {_aten.copy_.default, _aten._to_copy.default, _aten.index.Tensor, _aten.index_put_.default}


class _OnMps(Tensor):
    """A tensor of the device. PyTorch's C++ sees the device `meta`, for which autograd needs no thread of its own."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> _OnMps:
        if numbers.dtype == torch.float64:
            raise TypeError("MPS has no float64, and this operation gives it one")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device="meta",
        )
        made.numbers = numbers
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return _run(operation, arguments, options or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS

    def tolist(self) -> Any:
        # PyTorch refuses it for classes of one's own
        return self.numbers.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"_OnMps({self.numbers!r})"


class _Mps(TorchDispatchMode):
    """Makes tensors on the device for operations that are told it."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return _run(operation, arguments, options or {})


def _run(operation: Any, arguments: Any, options: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, _OnMps)]
    left_behind = [tensor for tensor in tensors if not isinstance(tensor, _OnMps) and tensor.ndim]
    if here and left_behind and operation not in _ACROSS:
        raise RuntimeError(f"{operation}: expected all tensors to be on one device, but found mps and cpu")
    #: By the identity of their numbers: an operation in place returns what it was given.
    given = {id(tensor.numbers): tensor for tensor in here}
    named = options.get("device")
    to_mps = bool(here) if named is None else torch.device(named).type in ("mps", "meta")
    if operation is _aten.copy_.default:
        to_mps = isinstance(arguments[0], _OnMps)
    arguments, options = tree_map_only(_OnMps, lambda tensor: tensor.numbers, (arguments, options))
    if named is not None:
        options["device"] = torch.device("cpu")
    found = operation(*arguments, **options)
    if not to_mps:
        # a copy: the CPU's tensor shares no memory with the device's
        return tree_map_only(Tensor, torch.clone, found) if here else found
    return tree_map_only(Tensor, lambda tensor: given[id(tensor)] if id(tensor) in given else _OnMps(tensor), found)


@contextmanager
def pretended_mps() -> Iterator[None]:
    """While entered, the device `mps` exists."""
    with _Mps():
        yield


def to_mps(module: nn.Module) -> Any:
    """Move a module's parameters and buffers to the device, in place; tied ones stay tied. Returns the module."""
    moved: dict[int, Any] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(_OnMps(parameter.detach()), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = moved.setdefault(id(buffer), _OnMps(buffer))
    return module
