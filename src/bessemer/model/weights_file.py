"""Weights on disk: one safetensors file, or several with an index, read and written tensor by tensor.

The safetensors library writes a file from tensors that are all in memory at once; here they may come one at a time, so that a
model can be converted that does not fit. Layout: a uint64 length, that many bytes of JSON with every tensor's type, shape and
place, then the tensors' bytes one after the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from bessemer.core.store import write_json
from bessemer.model.checkpoints import WEIGHTS, WEIGHTS_INDEX

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
#: Of codes, and of what goes with them.
CODE_DTYPES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
#: Bytes of a file that stay in memory after they have been read for good.
_MAPPED = 1 << 28
_SHARDS = "model-*-of-*.safetensors"


class Entry(NamedTuple):
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(folder: Path, entries: Sequence[Entry], tensors: Iterator[Tensor], shard_bytes: int | None = None) -> None:
    """Write the tensors, which come in the order of the entries, below `folder`: all files are there in the end, or none is
    and what was there before stays.

    shard_bytes: no file has more, but for one that a single tensor fills; None: one file.
    """
    shards = _split(entries, shard_bytes)
    names = [WEIGHTS] if len(shards) == 1 else [_shard(index, len(shards)) for index in range(1, len(shards) + 1)]
    temporaries = [folder / f".{name}.{os.getpid()}.tmp" for name in names]
    try:
        for path, shard in zip(temporaries, shards, strict=True):
            _write_file(path, shard, tensors)
        for path, name in zip(temporaries, names, strict=True):
            path.replace(folder / name)
    except BaseException:
        for path in temporaries:
            path.unlink(missing_ok=True)
        raise
    if len(shards) > 1:
        places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": _bytes(entries)}, "weight_map": places})
    for path in (folder / WEIGHTS, *folder.glob(_SHARDS), *([folder / WEIGHTS_INDEX] if len(shards) == 1 else [])):
        # of a model that was saved here before, in other pieces
        if path.name not in names:
            path.unlink(missing_ok=True)


def _bytes(entries: Sequence[Entry]) -> int:
    return sum(entry.bytes for entry in entries)


def _shard(index: int, count: int) -> str:
    return f"model-{index:05d}-of-{count:05d}.safetensors"


def _split(entries: Sequence[Entry], shard_bytes: int | None) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and shard_bytes is not None and _bytes(shards[-1]) + entry.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    return shards


def _write_file(path: Path, entries: Sequence[Entry], tensors: Iterator[Tensor]) -> None:
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for entry in entries:
        head[entry.name] = {
            "dtype": (DTYPES | CODE_DTYPES)[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [place, place + entry.bytes],
        }
        place += entry.bytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = next(tensors)
            assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, entry
            tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(stream)
            # gone before the next one is made
            del tensor


class WeightsFile:
    """A safetensors file, mapped into memory: a tensor takes memory when it is looked at.

    What has been looked at stays as long as the mapping does. So tensors that are only passed on come from a mapping of their
    own, which is renewed as it fills. Raises safetensors' and the system's errors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._passed = 0
        self._kept = self._passing = safe_open(path, framework="pt")

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._kept.keys())

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type of a tensor, which is not read."""
        tensor = self._kept.get_slice(name)
        return tuple(tensor.get_shape()), tensor.get_dtype()

    def kept(self, name: str) -> Tensor:
        """A tensor that will be used as it is: the file's own memory."""
        tensor: Tensor = self._kept.get_tensor(name)
        return tensor

    def passing(self, name: str) -> Tensor:
        """A tensor that will be copied or converted, and then be forgotten."""
        if self._passing is self._kept or self._passed > _MAPPED:
            self._passing = safe_open(self._path, framework="pt")
            self._passed = 0
        tensor: Tensor = self._passing.get_tensor(name)
        self._passed += tensor.nbytes
        return tensor
