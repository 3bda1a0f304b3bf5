"""Where our tensors lie in a family's files.

Most tensors are stored one to one under another name. Some families store several of ours in one (GPT-2's query, key and
value), or ours in many (an expert each): every stored tensor is described by the views of ours that it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """A matrix stored input by output."""
    return tensor.T


@dataclass(frozen=True)
class rows:  # noqa: N801  (a view, as the functions above are)
    """Some rows of a matrix, or of one expert's."""

    start: int
    stop: int
    expert: int | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor."""
        return (tensor if self.expert is None else tensor[self.expert])[self.start : self.stop]


@dataclass(frozen=True)
class each_expert:  # noqa: N801
    """A tensor of experts, or of anything else along its first dimension, each seen whole and through the same view.

    view: of any number of experts; it keeps their dimension first.
    """

    view: Callable[[Tensor], Tensor]

    def __call__(self, tensor: Tensor) -> Tensor:
        """The view of a tensor."""
        return self.view(tensor)


@dataclass(frozen=True)
class Place:
    """A part of one of our tensors: a view of it, in the order in which the file holds its numbers."""

    name: str
    view: Callable[[Tensor], Tensor] = whole


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: the places that it is made of, side by side along `dim`.

    shape: in the file, where that is not the places' own (numbers interleaved, say).
    """

    name: str
    places: tuple[Place, ...]
    dim: int = 0
    shape: tuple[int, ...] | None = None

    def pack(self, ours: Mapping[str, Tensor]) -> Tensor:
        """The tensor as the file holds it."""
        views = [place.view(ours[place.name]) for place in self.places]
        packed = views[0] if len(views) == 1 else torch.cat(views, dim=self.dim)
        return packed.reshape(self.shape).contiguous() if self.shape else packed.contiguous()

    def shape_in(self, ours: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape in the file, for tensors of ours with these shapes."""
        if self.shape:
            return self.shape
        views = [place.view(torch.empty(ours[place.name], device="meta")) for place in self.places]
        shape = list(views[0].shape)
        shape[self.dim] = sum(view.shape[self.dim] for view in views)
        return tuple(shape)

    def unpack(self, stored: Tensor, ours: Mapping[str, Tensor]) -> None:
        """Write the file's tensor into ours."""
        views = [place.view(ours[place.name]) for place in self.places]
        for view, piece in zip(views, self._pieces(stored, views), strict=True):
            view.copy_(piece)

    def pieces(self, stored: Tensor, ours: Mapping[str, tuple[int, ...]]) -> Sequence[Tensor]:
        """The file's tensor as a view for each place, in that place's form, for tensors of ours with these shapes."""
        return self._pieces(stored, [place.view(torch.empty(ours[place.name], device="meta")) for place in self.places])

    def _pieces(self, stored: Tensor, views: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(views) == 1:
            return [stored.reshape(views[0].shape)]
        return stored.split([view.shape[self.dim] for view in views], self.dim)

    @property
    def is_whole(self) -> bool:
        """Whether the file holds one of our tensors as it is."""
        return self.is_rows and self.places[0].view is whole

    @property
    def is_rows(self) -> bool:
        """Whether the file holds rows of one of our tensors, each as it is."""
        view = self.places[0].view
        return len(self.places) == 1 and self.shape is None and (view is whole or isinstance(view, rows))


def renamed(names: Iterator[str], rename: Callable[[str], str]) -> Iterator[Stored]:
    """One stored tensor for each of ours."""
    for name in names:
        yield Stored(rename(name), (Place(name),))
