"""Importance matrices: how strongly each input of each weight is used on a calibration text, in llama.cpp's two formats.

For a weight W (N, K) it is E[a²] of the K channels of its inputs a, over the text's tokens: the error of an output under codes
W + Δ is Δ a, of which the mean square is Σ Δ² E[a²] where the inputs are uncorrelated. Experts have an importance each.

GGUF (`general.type` imatrix): of every weight two float32 tensors, NAME.in_sum2 (matrices, K), sums of squares, and NAME.counts
(matrices, 1), tokens. The older format, `.dat`, little-endian: int32 entries; of each int32 bytes of the name, the name, int32
calls, int32 values, and float32 mean squares times the calls; then int32 chunks, int32 bytes and the name of the text.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.core.progress import Progress
from bessemer.core.store import new_file
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.formats.gguf_base import GgufFamily
from bessemer.model.formats.gguf_blocks import BLOCK_TYPES, dequantise, keeps_rows
from bessemer.model.initialisation import tensor_shapes
from bessemer.model.quantisation.calibration import fed_blocks, gather
from bessemer.model.quantisation.storage import quantisable_weights
from bessemer.tokenization.formats.gguf_metadata import read_head

# Shapes: E matrices of a tensor (experts, else 1), K inputs, R rows of text, T tokens of a row.

_SUMS, _COUNTS = ".in_sum2", ".counts"
_GGUF_MAGIC = b"GGUF"


class Entry(NamedTuple):
    """One weight's: sums of squares of its inputs, (E, K), and the tokens that were summed, (E,)."""

    sums_EK: NDArray[np.float32]
    counts_E: NDArray[np.float32]


@dataclass(frozen=True)
class ImportanceMatrix:
    """entries: by a GGUF tensor's name. datasets: names of the texts. chunks: rows of text, of chunk_size tokens each."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0

    def of(self, name: str, matrices: int, inputs: int) -> NDArray[np.float32] | None:
        """E[a²] of a tensor's inputs, (E, K); ones for an expert that no token visits. None where there is no entry.

        Raises ArtefactError for an entry of another shape: it is of another model.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.sums_EK.shape != (matrices, inputs):
            shape = " × ".join(map(str, entry.sums_EK.shape))
            raise ArtefactError(
                f"the importance matrix has {shape} numbers for {name!r}, and this model {matrices} × {inputs}; it is of "
                "another model: compute one with --calibrate TEXT"
            )
        counts_E1 = entry.counts_E[:, None]
        means_EK = np.divide(entry.sums_EK, counts_E1, out=np.ones_like(entry.sums_EK), where=counts_E1 > 0)
        # a matrix of zeros weighs nothing, and its codes would be arbitrary
        return np.where(means_EK.any(1, keepdims=True), means_EK, np.float32(1))


class _Squares:
    """Sums over the inputs of a matrix: x² by channel, and their number."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sums_K = torch.zeros(inputs, device=device)
        self.count = 0

    def add(self, hidden: Tensor) -> None:
        """Count inputs, (…, K)."""
        hidden_MK = hidden.detach().reshape(-1, hidden.shape[-1]).to(torch.float32)
        self.sums_K += hidden_MK.square().sum(0)
        self.count += len(hidden_MK)


@torch.no_grad()
def compute_importance(
    model: Decoder, family: GgufFamily, rows_RT: Tensor, *, dataset: str, progress: Progress
) -> ImportanceMatrix:
    """The importance of the inputs of a model's matrices in its blocks, on rows of tokens.

    family: whose tensors' names the entries have; tensors that hold no rows of ours have none.
    """
    modules, _ = quantisable_weights(model.config)
    ours: dict[str, Entry] = {}
    with progress.task("importance", total=len(list(model.blocks)), unit="blocks") as task:
        for fed in fed_blocks(model, rows_RT):
            names = {name: module for name, module in modules.items() if module.startswith(f"{fed.name}.")}
            found = gather(fed, list(names.values()), _Squares)
            for name, module in names.items():
                sums = found[module]
                counts_E = np.array([one.count for one in sums], np.float32)
                ours[name] = Entry(torch.stack([one.sums_K for one in sums]).cpu().numpy(), counts_E)
            task.advance()
    shapes = tensor_shapes(model.config)
    entries = {
        stored.name: ours[stored.views[0].name]
        for stored in family.stored(model.config, list(shapes))
        if stored.views[0].name in ours and all(keeps_rows(place.view, shapes[place.name]) for place in stored.views)
    }
    return ImportanceMatrix(entries, (dataset,), len(rows_RT), rows_RT.shape[1])


# ------------------------------------------------------------------------------------------------------------- files


def write_importance(matrix: ImportanceMatrix, path: Path) -> None:
    """Write a file of `llama-imatrix`: the older format for a name that ends in .dat, else GGUF. It is there whole or not at
    all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        if path.suffix == ".dat":
            with unfinished.open("wb") as stream:
                _write_legacy(matrix, stream)
        else:
            _write_gguf(matrix, unfinished)


def _write_gguf(matrix: ImportanceMatrix, path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "")
    # it is of no architecture
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", list(matrix.datasets))
    writer.add_uint32("imatrix.chunk_count", matrix.chunks)
    writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
    for name, entry in matrix.entries.items():
        writer.add_tensor(name + _SUMS, entry.sums_EK)
        writer.add_tensor(name + _COUNTS, entry.counts_E[:, None])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _write_legacy(matrix: ImportanceMatrix, stream: BinaryIO) -> None:
    stream.write(struct.pack("<i", len(matrix.entries)))
    calls = max(1, matrix.chunks)
    for name, entry in matrix.entries.items():
        counts_E1 = entry.counts_E[:, None]
        means_EK = np.divide(entry.sums_EK, counts_E1, out=np.ones_like(entry.sums_EK), where=counts_E1 > 0)
        encoded = name.encode()
        stream.write(struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, means_EK.size))
        stream.write((means_EK * np.float32(calls)).astype("<f4").tobytes())
    dataset = (matrix.datasets[0] if matrix.datasets else "").encode()
    stream.write(struct.pack("<ii", matrix.chunks, len(dataset)) + dataset)


def matrices_of(config: ModelConfig, family: GgufFamily) -> dict[str, int]:
    """How many matrices each tensor of a model's file holds: experts, else one."""
    shapes = tensor_shapes(config)
    stored = ((one.name, one.shape_in(shapes)) for one in family.stored(config, list(shapes)))
    return {name: shape[0] if len(shape) == 3 else 1 for name, shape in stored}


def read_importance(path: Path, matrices: Mapping[str, int]) -> ImportanceMatrix:
    """The importance matrix in a file of either format.

    matrices: how many each of the model's tensors has, by name: the older format does not say.

    Raises ArtefactError for a file that is neither, or damaged.
    """
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file; --calibrate TEXT computes an importance matrix and writes it there")
    with path.open("rb") as stream:
        if stream.read(4) != _GGUF_MAGIC:
            stream.seek(0)
            try:
                matrix = _read_legacy(stream, matrices)
            except (struct.error, UnicodeDecodeError, ValueError, MemoryError, OverflowError) as error:
                raise ArtefactError(
                    f"{path}: this is no importance matrix of llama-imatrix, or it is cut off ({error})"
                ) from None
        else:
            matrix = _read_gguf(path, stream)
    for name, entry in matrix.entries.items():
        if not (np.isfinite(entry.sums_EK).all() and (entry.sums_EK >= 0).all() and (entry.counts_E >= 0).all()):
            raise ArtefactError(f"{path}: {name!r} has numbers that are negative or not finite; compute the matrix again")
    if not matrix.entries:
        raise ArtefactError(f"{path}: it holds no weight's importance")
    return matrix


def _read_gguf(path: Path, stream: BinaryIO) -> ImportanceMatrix:
    values, infos = read_head(path)
    if values.get("general.type") != "imatrix":
        raise ArtefactError(
            f"{path}: a GGUF file of another kind ({values.get('general.type', 'a model')}), no importance matrix"
        )
    tensors: dict[str, NDArray[np.float32]] = {}
    for info in infos:
        block = BLOCK_TYPES.get(info.type)
        if block is None or block.values != 1:
            raise ArtefactError(f"{path}: tensor {info.name!r} is not of plain numbers")
        stream.seek(info.start)
        size = int(np.prod(info.shape, dtype=np.int64)) * block.bytes
        raw = stream.read(size)
        if len(raw) != size:
            raise ArtefactError(f"{path}: it ends within {info.name!r}: it is cut off")
        tensors[info.name] = dequantise(raw, block).reshape(info.shape)
    entries = {}
    for name, sums in tensors.items():
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        counts = tensors.get(weight + _COUNTS)
        sums_EK = sums.reshape(-1, sums.shape[-1])
        if counts is None or counts.size != len(sums_EK):
            raise ArtefactError(f"{path}: {weight + _COUNTS!r} is missing, or of another shape than {name!r}")
        entries[weight] = Entry(sums_EK, counts.reshape(-1))
    datasets = values.get("imatrix.datasets") or []
    return ImportanceMatrix(
        entries,
        tuple(map(str, datasets)),
        int(values.get("imatrix.chunk_count", 0)),
        int(values.get("imatrix.chunk_size", 0)),
    )


def _read_legacy(stream: BinaryIO, matrices: Mapping[str, int]) -> ImportanceMatrix:
    def number() -> int:
        return int(struct.unpack("<i", stream.read(4))[0])

    def text(size: int) -> str:
        if not 0 <= size < 1 << 20:
            raise ValueError(f"a name of {size} bytes")
        return stream.read(size).decode()

    entries = {}
    count = number()
    if not 0 < count < 1 << 24:
        raise ValueError(f"{count} entries")
    for _ in range(count):
        name = text(number())
        calls, size = number(), number()
        values = np.frombuffer(stream.read(4 * size), "<f4") if 0 < size < 1 << 28 else np.zeros(0, np.float32)
        if len(values) != size or size == 0:
            raise ValueError(f"it ends within {name!r}")
        count_E = max(matrices.get(name, 1), 1)
        if size % count_E:
            count_E = 1
        sums_EK = values.reshape(count_E, -1).astype(np.float32)
        entries[name] = Entry(sums_EK, np.full(count_E, max(calls, 1), np.float32))
    end = stream.read(8)
    if len(end) < 8:
        return ImportanceMatrix(entries)
    chunks, size = struct.unpack("<ii", end)
    return ImportanceMatrix(entries, (text(size),), chunks)
