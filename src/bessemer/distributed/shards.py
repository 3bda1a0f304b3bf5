"""Tensors of which this process holds a shard, recognised without loading PyTorch's module for them, which takes seconds.

Where that module is not loaded, there is no such tensor.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_MODULE = "torch.distributed.tensor"


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor where it is a DTensor; None where it is a plain one."""
    module = sys.modules.get(_MODULE)
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; a plain tensor itself."""
    sharded = as_dtensor(tensor)
    return tensor if sharded is None else sharded.to_local()


def sharded_dim(tensor: Tensor) -> int | None:
    """The dimension along which a DTensor is cut by its first axis; None where it is whole there, or a plain tensor."""
    sharded = as_dtensor(tensor)
    if sharded is None or not sharded.placements[0].is_shard():
        return None
    return int(sharded.placements[0].dim)  # type: ignore[attr-defined]
