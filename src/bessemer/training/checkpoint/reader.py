"""Safe reader of PyTorch's distributed checkpoints: tensors, plain values and metadata, without running code of the file.

The format stores its metadata, and every value that is not a tensor, as pickles, which PyTorch opens unrestricted. This reader
allows only the classes that describe a checkpoint, and reads values with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from bessemer.core.errors import CheckpointError
from bessemer.training.checkpoint.state import RANDOM_STATES

#: The classes and functions of PyTorch's metadata, by module.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        name
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
        if hasattr(metadata, name)
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"} & set(vars(filesystem)),
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # where Python 3.13 alone keeps it
        module = "pathlib" if module == "pathlib._local" else module
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)


class CheckpointReader(FileSystemReader):
    """PyTorch's reader of a folder with a restricted unpickler for the metadata. Raises CheckpointError for other contents."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as stream:
                loaded = _MetadataUnpickler(stream).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: this is not a checkpoint that can be opened safely ({error})") from None
        if not isinstance(loaded, Metadata):
            raise CheckpointError(f"{path}: these are not the metadata of a checkpoint")
        if loaded.storage_meta is None:
            loaded.storage_meta = StorageMeta()
        loaded.storage_meta.load_id = self.load_id
        return loaded


class _Planner(DefaultLoadPlanner):
    """PyTorch's planner, restricted to plain values and tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{name}: a checkpoint's value is neither a tensor nor a plain value ({error})") from None
        safe = io.BytesIO()
        torch.save(plain, safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


def read_checkpoint(values: dict[str, Any], folder: Path, *, alone: bool, group: Any = None) -> None:
    """Load a checkpoint into nested `values`. Raises CheckpointError when it holds more than tensors and plain values.

    Random states that the checkpoint does not hold are taken out of `values`: it may be of fewer ranks, of another device, or
    of an earlier version.
    """
    # first by itself: PyTorch wraps errors that are raised inside `load`
    held = CheckpointReader(folder).read_metadata().state_dict_metadata
    states = values.get(RANDOM_STATES, {})
    for name in [name for name in states if f"{RANDOM_STATES}.{name}" not in held]:
        del states[name]
    try:
        load(values, storage_reader=CheckpointReader(folder), planner=_Planner(), no_dist=alone, process_group=group)
    except CheckpointException as error:
        causes = (cause for cause, _ in error.failures.values())
        known = next((cause for cause in causes if isinstance(cause, CheckpointError)), None)
        if known is None:
            raise
        raise CheckpointError(f"{folder}: {known}") from None


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def check_plain(values: Any, name: str = "") -> None:
    """Raise CheckpointError when nested values hold something that `read_checkpoint` would refuse."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            check_plain(value, f"{name}.{key}" if name else str(key))
    elif type(values) in (list, tuple, set):
        for value in values:
            check_plain(value, name)
    elif not isinstance(values, torch.Tensor) and type(values) not in _PLAIN:
        raise CheckpointError(
            f"{name}: a checkpoint holds tensors and plain values, and this is a {type(values).__name__}; keep one of those "
            "in the optimizer's state"
        )
