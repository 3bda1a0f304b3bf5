"""Parts of our tensors, filled from a family's files: what one process holds of a model that is sharded over several.

A tensor of a file is mapped into memory, so what no part covers is not read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.model.families.layout import Place, each_expert, rows, transposed, whole


@dataclass(frozen=True)
class Part:
    """A box of one of our tensors. tensor: the memory for it, on any device, of any type of numbers. start: the index of its
    first number in the whole tensor."""

    tensor: Tensor
    start: tuple[int, ...]

    @property
    def box(self) -> tuple[slice, ...]:
        """Its place in the whole tensor, a slice a dimension."""
        return tuple(slice(first, first + size) for first, size in zip(self.start, self.tensor.shape, strict=True))


@torch.no_grad()
def fill_part(part: Part, place: Place, piece: Tensor, shape: tuple[int, ...]) -> int:
    """Copy into a part of a tensor of `shape` the numbers of it that a place has; returns how many.

    piece: of the file, in the place's form (`Stored.pieces`). Memory beside the part is that of one expert at most.
    """
    view, box = place.view, part.box
    if isinstance(view, rows):
        return _fill_rows(part, view, piece)
    if isinstance(view, each_expert):
        for number, expert in enumerate(range(box[0].start, box[0].stop)):
            whole_expert = torch.empty((1, *shape[1:]), dtype=piece.dtype)
            view(whole_expert).copy_(piece[expert : expert + 1])
            part.tensor[number].copy_(whole_expert[0][box[1:]])
    else:
        assert view is whole or view is transposed, view
        part.tensor.copy_((piece if view is whole else piece.T)[box])
    return part.tensor.numel()


def _fill_rows(part: Part, view: rows, piece: Tensor) -> int:
    target, box = part.tensor, part.box
    if view.expert is not None:
        experts, box = box[0], box[1:]
        if not experts.start <= view.expert < experts.stop:
            return 0
        target = target[view.expert - experts.start]
    first, stop = max(view.start, box[0].start), min(view.stop, box[0].stop)
    if first >= stop:
        return 0
    target = target[first - box[0].start : stop - box[0].start]
    target.copy_(piece[(slice(first - view.start, stop - view.start), *box[1:])])
    return target.numel()
