"""The norm of a gradient that lies in pieces on many ranks, its clipping, and tensors laid out anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement

from bessemer.distributed.mesh import Mesh


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, mesh: Mesh, *, scale: float = 1.0) -> float:
    """Scale the gradients so that their joint norm is at most `largest`; returns the norm before, infinite or NaN as it is.

    Right on any mixture of axes and meshes: the sum over all ranks of each one's squares over the number of ranks of its
    pipeline stage that hold the same piece. One all-reduce of one number. scale: what the gradients were multiplied by, for
    float16; it is taken off.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if mesh.alone:
        norm = torch.nn.utils.get_total_norm(gradients)
    else:
        squares = [local_squares(gradient, mesh) for gradient in gradients]
        norm = mesh.sum(torch.stack(squares).sum() if squares else torch.zeros(())).sqrt()
    norm = norm / scale
    # as torch's clip_grad_norm_ scales: a factor of at most 1, applied always, so that no rank decides by itself
    factor = (largest / (norm + 1e-6)).clamp(max=1.0) / scale
    for gradient in gradients:
        piece = local(gradient)
        piece.mul_(factor.to(piece.device, piece.dtype))
    return float(norm)


def redistributed(tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
    """The same tensor laid out in another way, one axis after the other, the outermost first.

    FSDP cuts what the tensor axis has left, so its cut must be undone first; and of several axes at once PyTorch warns that
    it will go one by one.
    """
    found = list(tensor.placements)
    for axis, placement in enumerate(placements):
        if found[axis] != placement:
            found[axis] = placement
            tensor = tensor.redistribute(placements=found)
    return tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a distributed tensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_squares(tensor: Tensor, mesh: Mesh, less: Tensor | None = None) -> Tensor:
    """What this rank adds to the sum of a tensor's squares over all ranks, float64: those of its piece, over the number of
    ranks of its pipeline stage that hold the same one. less: taken off the piece first."""
    piece = local(tensor).double()
    if less is not None:
        piece = piece - less.to(piece.device)
    return piece.square().sum() / _copies(tensor, mesh)


def _copies(tensor: Tensor, mesh: Mesh) -> int:
    """How many ranks of this pipeline stage hold the same piece of a tensor."""
    pieces = 1
    if isinstance(tensor, DTensor):
        sizes = tensor.device_mesh.shape
        for size, placement in zip(sizes, tensor.placements, strict=True):
            pieces *= 1 if placement.is_replicate() else size
    return mesh.layout.stage_ranks // pieces
