"""Weights of a model that was parallelised before it is loaded: each process reads its own shards from the model folder.

A model on the meta device has shapes and no memory. It is parallelised there, and only what this process holds is then given
memory and filled: the processes of a host need the memory of one model between them, and none needs that of a whole one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bessemer.distributed.shards import local
from bessemer.model.decoder import Decoder
from bessemer.model.families.parts import Part
from bessemer.model.stored_tensors import StoredTensors, read_parts


def load_shards(
    parts: Sequence[Decoder],
    stored: StoredTensors,
    device: torch.device | str,
    added: Mapping[str, Tensor] | None = None,
) -> None:
    """Give what this process holds of a model its memory on `device` and its weights, in place.

    parts: made from `empty_decoder(stored.config)` and parallelised: the model, or this rank's stages of a pipeline. They keep
    their dtype, and have the values that `load_model` gives them. added: whole tensors that the folder does not hold, such as
    a new head. Raises ArtefactError as `read_parts`.
    """
    for part in parts:
        # FSDP takes over the new memory when it is given this way
        part._apply(lambda tensor: _on_device(tensor, device))
    added = added or {}
    shards: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        for name, tensor in _weights(part, stored):
            shard = _shard(tensor)
            if name in added:
                shard.tensor.copy_(added[name][shard.box])
            else:
                shards[name].append(shard)
    read_parts(stored, shards)


def _on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, with memory where it has none; tables of rotary positions have their values already."""
    return torch.empty_like(tensor, device=device) if tensor.device.type == "meta" else tensor.to(device)


def _weights(part: Decoder, stored: StoredTensors) -> Iterator[tuple[str, Tensor]]:
    """The parameters, and those buffers that a model folder holds."""
    yield from part.named_parameters()
    yield from ((name, buffer) for name, buffer in part.named_buffers() if name in stored.shapes)


def _shard(tensor: Tensor) -> Part:
    """This process's shard of a tensor, with its place in the whole one.

    A DTensor's axes are taken from the last to the first: FSDP shards what tensor or expert parallelism has sharded.
    """
    start, size = [0] * tensor.ndim, list(tensor.shape)
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        index = mesh.get_coordinate()
        assert index is not None
        for ranks, rank, placement in reversed([*zip(mesh.shape, index, tensor.placements, strict=True)]):
            if placement.is_replicate():
                continue
            sharded: Any = placement
            # as torch.chunk cuts
            each = -(-size[sharded.dim] // ranks)
            first = min(rank * each, size[sharded.dim])
            start[sharded.dim] += first
            size[sharded.dim] = min(each, size[sharded.dim] - first)
    shard = local(tensor.detach())
    assert shard.shape == torch.Size(size), (shard.shape, size)
    return Part(shard, tuple(start))
