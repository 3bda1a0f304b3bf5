"""Real collectives, counted on fake process groups: every rank's place can be taken by one process, and no data moves."""

import contextlib

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Dispatched collectives, and whether their whole tensor is the first argument (what is received) or the second (given).
_OPERATIONS = {
    "_allgather_base_": ("all-gather", 0),
    "all_gather_into_tensor": ("all-gather", None),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor": ("reduce-scatter", 0),
    "allreduce_": ("all-reduce", 0),
    "all_reduce": ("all-reduce", 0),
    "all_reduce_": ("all-reduce", 0),
    "alltoall_base_": ("all-to-all", 1),
    "all_to_all_single": ("all-to-all", 0),
    "send": ("send", 0),
}


class CountingCollectives(TorchDispatchMode):
    """While entered, notes (operation, ranks, bytes of the whole tensor) of each collective."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        namespace, name = function._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional") and name in _OPERATIONS:
            operation, position = _OPERATIONS[name]
            whole = result if position is None else arguments[position]
            size = sum(tensor.untyped_storage().nbytes() if position is None else tensor.nbytes for tensor in _tensors(whole))
            self.seen.append((operation, _ranks(arguments), size))
        return result

    def tensors(self, smallest=64):
        """(operation, ranks) → (number, bytes) of those that move more than a number or two."""
        found = {}
        for operation, ranks, size in self.seen:
            if size >= smallest:
                count, total = found.get((operation, ranks), (0, 0))
                found[operation, ranks] = (count + 1, total + size)
        return found


def _tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _ranks(arguments):
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            with contextlib.suppress(RuntimeError):
                return dist.ProcessGroup.unbox(argument).size()
        if isinstance(argument, str):
            with contextlib.suppress(Exception):
                return dist.distributed_c10d._resolve_process_group(argument).size()
    raise AssertionError(f"no group among {arguments}")


@contextlib.contextmanager
def fake_ranks(count, rank=0):
    """This process as one of so many ranks whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
