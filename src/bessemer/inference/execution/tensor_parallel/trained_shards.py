"""Weights of a model in training, for a copy of it that the ranks of its tensor axis serve.

The training shards of a rank's tensor group are those that inference takes, so a weight is gathered over FSDP's axes alone, one
after the other; without FSDP nothing travels. No rank has the whole model, unless one tensor rank is the whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from bessemer.distributed.gradients import redistributed
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.parallelize import parallelize_for_inference
from bessemer.distributed.sharding import release_gathered
from bessemer.distributed.shards import local
from bessemer.inference.execution.tensor_parallel.weights import held_weight
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import empty_decoder


def serving_copy(trained: Decoder, mesh: Mesh, dtype: torch.dtype | None) -> Decoder:
    """A decoder for inference of this rank's shard, on the device of a model in training; `copy_trained` gives it values.

    mesh: of the tensor axis alone. dtype: of its weights; None: as in training.
    """
    model = empty_decoder(trained.config)
    if not mesh.alone:
        parallelize_for_inference(model, mesh)
    device, dtype = trained.device, dtype or trained.dtype

    def placed(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            return tensor.to(device)
        return torch.empty_like(tensor, device=device, dtype=dtype if tensor.is_floating_point() else None)

    # tables of positions have values already, and stay in their type
    model._apply(placed)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def copy_trained(trained: Decoder, model: Decoder) -> None:
    """Copy a trained model's weights into its `serving_copy`. All ranks of the job call it.

    Device memory beside both: one weight of this rank's shard, gathered.
    """
    release_gathered(trained)
    for own, source in _pairs(trained, model):
        local(own).copy_(_as_held(source, own))


def _pairs(trained: Decoder, model: Decoder) -> Iterator[tuple[Tensor, Tensor]]:
    for name in model.state_dict():
        yield held_weight(model, name), held_weight(trained, name)


def _as_held(source: Tensor, own: Tensor) -> Tensor:
    """The part of a trained weight that a rank of inference holds."""
    shard = source
    if isinstance(source, DTensor):
        axes = source.device_mesh.mesh_dim_names or ()
        kept = [placement if axis == "tensor" else Replicate() for axis, placement in zip(axes, source.placements, strict=True)]
        shard = local(redistributed(source, kept))
    if shard.shape == local(own).shape:
        return shard
    # experts that an expert axis has spread are whole here
    assert isinstance(own, DTensor), (shard.shape, own.shape)
    (cut,) = own.placements
    assert isinstance(cut, Shard), (shard.shape, own.shape)
    return shard.chunk(own.device_mesh.size(), cut.dim)[own.device_mesh.get_local_rank()]
