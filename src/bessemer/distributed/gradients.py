"""Gradient norm and clipping over all ranks, and redistribution of sharded tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement

from bessemer.distributed.mesh import Mesh
from bessemer.distributed.shards import local
from bessemer.model.device import in_float64, widest_float


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, mesh: Mesh, *, scale: float = 1.0) -> Tensor:
    """Scale the gradients so that their total norm is at most `largest`; returns the norm before, which may be inf or NaN, a
    scalar on their device: the host does not wait for it.

    Correct for any mixture of axes and meshes: each rank's squares count divided by the number of ranks of its pipeline stage
    that hold the same shard. One all-reduce of one number. scale: the loss scale of float16, which is divided out.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if mesh.alone:
        norm = torch.nn.utils.get_total_norm(gradients)
    else:
        squares = [local_squares(gradient, mesh) for gradient in gradients]
        norm = mesh.sum(torch.stack(squares).sum() if squares else torch.zeros(())).sqrt()
    norm = norm / scale
    # as in torch's clip_grad_norm_: a factor of at most 1, always applied, so that no rank decides by itself
    factor = (largest / (norm + 1e-6)).clamp(max=1.0) / scale
    for gradient in gradients:
        shard = local(gradient)
        shard.mul_(factor.to(shard.device, shard.dtype))
    return norm


def redistributed(tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
    """The tensor with other placements, redistributed one axis after the other, the outermost first.

    FSDP shards the shards of the tensor axis, so it must be undone first; for several axes at once PyTorch warns that it goes
    one by one.
    """
    current = list(tensor.placements)
    for axis, placement in enumerate(placements):
        if current[axis] != placement:
            current[axis] = placement
            tensor = tensor.redistribute(placements=current)
    return tensor


def whole_tensors(tensors: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Unsharded tensors by name, on every process, those of the other pipeline stages included, which come to host memory.

    Every process calls this with its own. Without gradients; what is not sharded is shared.
    """
    whole = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach() for name, tensor in tensors.items()
    }
    if mesh.layout.pipeline == 1:
        return whole
    stages: list[dict[str, Tensor]] = [{} for _ in range(mesh.layout.world_size)]
    dist.all_gather_object(stages, {name: tensor.cpu() for name, tensor in whole.items()})
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def local_squares(tensor: Tensor, mesh: Mesh, less: Tensor | None = None) -> Tensor:
    """This rank's summand of a tensor's sum of squares over all ranks, float64: the squares of its shard over the number of
    ranks of its pipeline stage that hold the same shard. less: subtracted from the shard first.

    A device without float64 sums in float32, and the sum is returned on the CPU."""
    shard = local(tensor)
    shard = shard.to(widest_float(shard.device))
    if less is not None:
        shard = shard - less.to(shard.device)
    return in_float64(shard.square().sum()) / _copies(tensor, mesh)


def _copies(tensor: Tensor, mesh: Mesh) -> int:
    """Number of ranks of this pipeline stage that hold the same shard of a tensor."""
    shards = 1
    if isinstance(tensor, DTensor):
        sizes = tensor.device_mesh.shape
        for size, placement in zip(sizes, tensor.placements, strict=True):
            shards *= 1 if placement.is_replicate() else size
    return mesh.layout.stage_ranks // shards
