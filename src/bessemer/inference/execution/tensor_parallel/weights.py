"""New weights for a sharded model: rank 0 broadcasts whole tensors in pieces, and every rank keeps its shard of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.distributed.shards import as_dtensor, local, sharded_dim
from bessemer.inference.execution.weights import check_weights
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import tensor_shapes

#: Most bytes of a piece, unless a single row has more.
PIECE_BYTES = 64 << 20


class Piece(NamedTuple):
    """Neighbouring rows of a whole tensor: `start` and `shape`, (rows, …)."""

    name: str
    start: int
    shape: tuple[int, ...]


def check_whole_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise RequestError for a name or a shape that the unsharded model does not have."""
    check_weights(weights, tensor_shapes(config))


def pieces_of(model: Decoder, weights: Mapping[str, Tensor]) -> Iterator[tuple[Piece, Tensor]]:
    """Whole tensors in pieces of at most `PIECE_BYTES`, where the model's weights lie and in their types."""
    for name, whole in weights.items():
        dtype = held_weight(model, name).dtype
        rows = max(1, PIECE_BYTES // max(1, whole[0].numel() * dtype.itemsize))
        for start, part in zip(range(0, len(whole), rows), whole.split(rows), strict=True):
            yield Piece(name, start, tuple(part.shape)), part.detach().to(model.device, dtype).contiguous()


@torch.no_grad()
def exchange_piece(model: Decoder, piece: Piece, values: Tensor | None = None) -> None:
    """Copy a piece into this rank's shard. All ranks call it with the same piece; values: on rank 0, what it holds."""
    own = held_weight(model, piece.name)
    shard = local(own)
    if values is None:
        values = torch.empty(piece.shape, dtype=shard.dtype, device=shard.device)
    # as bytes: of any type
    dist.broadcast(values.view(torch.uint8), src=0)
    start, stop = piece.start, piece.start + piece.shape[0]
    sharded, dim = as_dtensor(own), sharded_dim(own)
    if sharded is not None and dim is not None:
        assert sharded.device_mesh.ndim == 1, "a weight is sharded over one axis"
        rank = sharded.device_mesh.get_local_rank()
        if dim == 0:
            # of a vocabulary that was padded, the last rows are no one's
            first = rank * len(shard)
            begin, end = max(start, first), min(stop, first + len(shard))
            if begin < end:
                shard[begin - first : end - first] = values[begin - start : end - start]
            return
        values = values.chunk(sharded.device_mesh.size(), dim)[rank]
    shard[start:stop] = values


def held_weight(model: Decoder, name: str) -> Tensor:
    """A weight as this rank holds it, by its name in `state_dict`."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    parameter = module._parameters.get(leaf)
    held = module._buffers[leaf] if parameter is None else parameter
    assert held is not None, "names were checked"
    return held
