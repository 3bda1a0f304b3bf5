"""The memory that tensors occupy while something runs, counted storage by storage."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While entered, `live` bytes of storages made meanwhile, and the `peak` of it. Those of `known` tensors count 0."""

    def __init__(self, known=()):
        super().__init__()
        self.live = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # alive, so that nobody gets their addresses
        self._sizes = {storage._cdata: 0 for storage in self._known}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage):
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, storage):
        self.live -= self._sizes.pop(storage, 0)


def storage_bytes(tensors):
    """Bytes of the storages of some tensors, each once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())
