"""Parallelism applied to a single-device model from outside, and the weights read into it afterwards.

The model's code is unaware of it, and parameter names stay. A model on the meta device has shapes and no memory: it is
parallelised there, and each process then reads its own shards from the model folder. The processes of a host need the memory
of one model between them, and none that of a whole one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bessemer.distributed.context import apply_context_parallel
from bessemer.distributed.expert import apply_expert_parallel, apply_expert_parallel_for_inference
from bessemer.distributed.layout import ParallelConfig
from bessemer.distributed.mesh import Mesh, local
from bessemer.distributed.sharding import apply_fsdp
from bessemer.distributed.stages import DecoderStage, split_into_stages
from bessemer.distributed.tensor import apply_tensor_parallel, logits_on_rank_0, pad_vocabulary
from bessemer.model.decoder import Decoder
from bessemer.model.families.layout import TensorBox
from bessemer.model.storage.weights import StoredTensors, read_boxes


def load_shards(
    parts: Sequence[Decoder],
    stored: StoredTensors,
    device: torch.device | str,
    added: Mapping[str, Tensor] | None = None,
) -> None:
    """Give what this process holds of a model its memory on `device` and its weights, in place.

    parts: made from `empty_decoder(stored.config)` and parallelised: the model, or this rank's stages of a pipeline. They keep
    their dtype, and have the values that `load_model` gives them. added: whole tensors that the folder does not hold, such as
    a new head. Raises ArtefactError as `read_boxes`.
    """
    for part in parts:
        # through `_apply`, so that FSDP adopts the new memory
        part._apply(lambda tensor: _on_device(tensor, device))
    added = added or {}
    shards: dict[str, list[TensorBox]] = defaultdict(list)
    for part in parts:
        for name, tensor in _weights(part, stored):
            shard = _shard(tensor)
            if name in added:
                shard.tensor.copy_(added[name][shard.box])
            else:
                shards[name].append(shard)
    read_boxes(stored, shards)


def _on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, with memory where it has none; tables of rotary positions have their values already."""
    return torch.empty_like(tensor, device=device) if tensor.device.type == "meta" else tensor.to(device)


def _weights(part: Decoder, stored: StoredTensors) -> Iterator[tuple[str, Tensor]]:
    """The parameters, and those buffers that a model folder holds."""
    yield from part.named_parameters()
    yield from ((name, buffer) for name, buffer in part.named_buffers() if name in stored.shapes)


def _shard(tensor: Tensor) -> TensorBox:
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
            # sizes as of torch.chunk
            each = -(-size[sharded.dim] // ranks)
            first = min(rank * each, size[sharded.dim])
            start[sharded.dim] += first
            size[sharded.dim] = min(each, size[sharded.dim] - first)
    shard = local(tensor.detach())
    assert shard.shape == torch.Size(size), (shard.shape, size)
    return TensorBox(shard, tuple(start))


class Parallelized(NamedTuple):
    """The model that a rank trains, and its pipeline stages in order; empty without a pipeline."""

    model: Decoder
    stages: list[DecoderStage]


def parallelize(
    model: Decoder,
    mesh: Mesh,
    config: ParallelConfig,
    *,
    blocks: Callable[[Decoder], None] = lambda part: None,
    dtype: torch.dtype | None = None,
    offload: bool = False,
) -> Parallelized:
    """Parallelise a model over a mesh, in place.

    blocks: applied to the blocks before FSDP and context parallelism: activation checkpointing, compilation. dtype and offload:
    as for `apply_fsdp`.
    """
    stages: list[DecoderStage] = []
    if mesh.layout.pipeline > 1:
        stages = split_into_stages(model, mesh.layout, mesh.place.pipeline, in_a_v=config.pipeline_schedule == "zbv")
    parts: Sequence[Decoder] = stages or [model]
    if mesh.layout.tensor > 1:
        for part in parts:
            apply_tensor_parallel(part, mesh)
    if mesh.layout.expert > 1:
        for part in parts:
            apply_expert_parallel(part, mesh)
    blocks(model)
    if mesh.layout.context > 1:
        for part in parts:
            apply_context_parallel(part, mesh, config.context_method)
    if not mesh.alone and (mesh.layout.stage_ranks > 1 or offload):
        for part in parts:
            apply_fsdp(part, mesh, dtype=dtype, offload=offload)
    return Parallelized(model, stages)


def parallelize_for_inference(model: Decoder, mesh: Mesh) -> None:
    """Shard a model over the tensor and expert axes, in place, for inference on a batch that every rank has whole.

    Attention computes this rank's heads, the same on all ranks of the expert axis, and outputs are all-reduced. `logits`
    returns logits on rank 0 and an empty tensor elsewhere.
    """
    if mesh.layout.tensor > 1:
        pad_vocabulary(model, mesh.layout.tensor)
        apply_tensor_parallel(model, mesh, whole=True)
    if mesh.layout.expert > 1:
        apply_expert_parallel_for_inference(model, mesh)
    logits_on_rank_0(model, mesh)
