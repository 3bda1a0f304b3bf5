"""Weights on disk: safetensors files, and the place of each of their tensors in the decoder.

One file, or several with an index, is read and written tensor by tensor: the safetensors library needs all tensors in memory at
once, and a model that does not fit can be converted here. Layout: a uint64 length, that many bytes of JSON with every tensor's
type, shape and place, then the tensors' bytes one after the other.

Tensors are checked against the config before any is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.core.store import read_json, write_json
from bessemer.model.config import ModelConfig
from bessemer.model.families import family_of
from bessemer.model.families.layout import Stored, TensorBox, fill_box
from bessemer.model.initialisation import tensor_shapes
from bessemer.model.quantisation.storage import Layout
from bessemer.model.quantisation.storage_parts import StoredPart
from bessemer.model.storage.library import WEIGHTS, WEIGHTS_INDEX, refuse_checkpoint

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
#: Dtypes of codes, and of their scales and zeros.
CODE_DTYPES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
#: Bytes read through a mapping before it is renewed, which frees their pages.
_MAPPED = 1 << 26
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
        # files of a model saved here before, with other shards
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
            # freed before the next tensor is made
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


EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
#: Prefixes that tensor names of some published files lack.
_PREFIXES = {"gpt2": "transformer."}


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a model folder.

    config: as in config.json, but without multi-token prediction where the files have no tensors of it, as `transformers` does
    not save them. shapes: of the decoder's tensors, by our names. files: for each file, its tensors' names and which of our
    tensors they hold. second_head: the file that holds the tied embedding a second time, as the head, under `head_name`.
    """

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    files: dict[Path, dict[str, Stored | StoredPart]]
    second_head: Path | None
    head_name: str = HEAD

    def check_second_head(self, embedding: Tensor) -> None:
        """Raise ArtefactError when the head that the files hold beside a tied embedding differs from it: that is another
        model."""
        assert self.second_head is not None
        with opening(self.second_head):
            head = WeightsFile(self.second_head).kept(self.head_name)
        if not torch.equal(head.to(embedding.device, embedding.dtype), embedding):
            raise ArtefactError(
                f"{self.second_head}: tensor {self.head_name!r} differs from the embedding that config.json ties it to"
            )


def find_tensors(folder: Path, config: ModelConfig, layout: Layout | None = None) -> StoredTensors:
    """The tensors of a model folder with this config. layout: of a quantised model.

    Raises ArtefactError naming the file and what is wrong: a missing or unexpected tensor, a shape or type that disagrees with
    the config, a damaged file.
    """
    shapes, family = tensor_shapes(config), family_of(config)
    plain = layout.plain if layout else family.stored(config, list(shapes))
    wanted = {stored.name: stored for stored in plain}
    coded = {part.name: part for part in layout.parts} if layout else {}
    ignored = (*family.ignored, *(layout.ignored if layout else ()))
    plain_embedding = any(stored.views[0].name == EMBEDDING for stored in wanted.values())
    files: dict[Path, dict[str, Stored | StoredPart]] = {}
    missing = dict.fromkeys((*wanted, *(name for name, part in coded.items() if part.unpack)))
    second_head: Path | None = None
    for path in weight_files(folder):
        here: dict[str, Stored | StoredPart] = {}
        with opening(path):
            file = WeightsFile(path)
            for disk_name in file.names():
                if disk_name in coded:
                    _check_codes(coded[disk_name], file, path)
                    here[disk_name] = coded[disk_name]
                    missing.pop(disk_name, None)
                    continue
                stored = wanted.get(disk_name) or wanted.get(f"{_PREFIXES.get(family.model_type)}{disk_name}")
                if stored is None:
                    if disk_name == HEAD and config.tie_word_embeddings and plain_embedding:
                        second_head = path
                        continue
                    if any(re.fullmatch(pattern, disk_name) for pattern in ignored):
                        continue
                    raise ArtefactError(f"{path}: unexpected tensor {disk_name!r}; config.json describes no such part")
                check_plain(stored.shape_in(shapes), disk_name, file, path)
                here[disk_name] = stored
                missing.pop(stored.name, None)
        files[path] = here
    of_mtp = {name for name, stored in wanted.items() if stored.views[0].name.startswith("mtp.")}
    of_mtp |= {name for name, part in coded.items() if part.ours.startswith("mtp.") and part.unpack}
    if of_mtp and of_mtp <= missing.keys():
        config = config.with_changes(num_nextn_predict_layers=0)
        missing = {name: None for name in missing if name not in of_mtp}
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ArtefactError(f"{folder}: tensor {min(missing)!r}{more} is missing from the weights")
    return StoredTensors(config, shapes, files, second_head)


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """While entered, errors of reading a file of weights become ArtefactError."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path}: this is not a whole safetensors file ({error}); fetch or make it again") from None


def check_plain(expected: tuple[int, ...], name: str, file: WeightsFile, path: Path) -> None:
    """Raise ArtefactError for a tensor of another shape, or whose numbers are no plain ones."""
    shape, kind = file.describe(name)
    if shape != expected:
        raise ArtefactError(f"{path}: {name!r} has shape {shape}, config.json asks for {expected}")
    if kind not in DTYPES.values():
        raise ArtefactError(f"{path}: {name!r} has type {kind}; supported: {', '.join(DTYPES.values())}")


def _check_codes(part: StoredPart, file: WeightsFile, path: Path) -> None:
    shape, kind = file.describe(part.name)
    wanted = (DTYPES | CODE_DTYPES)[part.dtype]
    fits = shape == part.shape or (part.any_length and len(shape) == 1)
    if not fits or (kind != wanted and not (kind in DTYPES.values() and wanted in DTYPES.values())):
        raise ArtefactError(f"{path}: {part.name!r} is {kind} of shape {shape}, config.json asks for {wanted} of {part.shape}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that an index names."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS_INDEX).exists():
        index = read_json(folder / WEIGHTS_INDEX, "index of weights")
        names = sorted({str(name) for name in index.get("weight_map", {}).values()})
        for name in names:
            if Path(name).name != name or not (folder / name).exists():
                raise ArtefactError(f"{folder / name}: missing; {WEIGHTS_INDEX} names it")
        return [folder / name for name in names]
    refuse_checkpoint(folder)
    raise ArtefactError(f"{folder / WEIGHTS}: no such file; this folder holds no weights")


def read_boxes(stored: StoredTensors, parts: Mapping[str, Sequence[TensorBox]]) -> None:
    """Fill parts of the decoder's tensors, by our names, from the files of a model that is not quantised.

    Files are mapped, and read where a part has its numbers; memory is that of one expert at most. Raises ArtefactError when a
    file cannot be read, or repeats the tied embedding as another head.
    """
    filled = dict.fromkeys(parts, 0)
    for path, tensors in stored.files.items():
        with opening(path):
            file = WeightsFile(path)
            for disk_name, one in tensors.items():
                assert isinstance(one, Stored), disk_name
                if not any(place.name in parts for place in one.views):
                    continue
                for place, piece in zip(one.views, one.pieces(file.passing(disk_name), stored.shapes), strict=True):
                    for part in parts.get(place.name, ()):
                        filled[place.name] += fill_box(part, place.view, piece, stored.shapes[place.name])
    for name, wanted in parts.items():
        assert filled[name] == sum(part.tensor.numel() for part in wanted), name
    if stored.second_head is not None:
        stored.check_second_head(_embedding(stored))


def _embedding(stored: StoredTensors) -> Tensor:
    """The embedding as the files hold it."""
    path, disk_name = next(
        (path, disk_name)
        for path, tensors in stored.files.items()
        for disk_name, one in tensors.items()
        if isinstance(one, Stored) and one.views[0].name == EMBEDDING
    )
    with opening(path):
        return WeightsFile(path).kept(disk_name)
