"""Which of the decoder's tensors a family's files hold, and how.

Most tensors are stored one to one under another name. Some families store several of ours in one (GPT-2's query, key and
value), or ours in many (an expert each): every stored tensor is described by the views of ours that it is made of.

A process that holds a part of a sharded model fills only that part. Files are mapped into memory, so what no part covers is not
read. Regular expressions that a file gives for tensor names are matched within a time limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import regex
import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError


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
class TensorView:
    """A part of one of our tensors, in the order in which the file holds its numbers. view: takes it from the tensor."""

    name: str
    view: Callable[[Tensor], Tensor] = whole


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: views of ours, side by side along `dim`.

    shape: in the file, where that is not the views' own (numbers interleaved, say).
    """

    name: str
    views: tuple[TensorView, ...]
    dim: int = 0
    shape: tuple[int, ...] | None = None

    def pack(self, ours: Mapping[str, Tensor]) -> Tensor:
        """The tensor as the file holds it."""
        parts = [each.view(ours[each.name]) for each in self.views]
        packed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)
        return packed.reshape(self.shape).contiguous() if self.shape else packed.contiguous()

    def shape_in(self, ours: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape in the file, for tensors of ours with these shapes."""
        if self.shape:
            return self.shape
        parts = self._empty_parts(ours)
        shape = list(parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in parts)
        return tuple(shape)

    def unpack(self, stored: Tensor, ours: Mapping[str, Tensor]) -> None:
        """Write the file's tensor into ours."""
        parts = [each.view(ours[each.name]) for each in self.views]
        for part, values in zip(parts, self._split(stored, parts), strict=True):
            part.copy_(values)

    def pieces(self, stored: Tensor, ours: Mapping[str, tuple[int, ...]]) -> Sequence[Tensor]:
        """The file's tensor cut into the form of each view, for tensors of ours with these shapes."""
        return self._split(stored, self._empty_parts(ours))

    def _empty_parts(self, ours: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
        return [each.view(torch.empty(ours[each.name], device="meta")) for each in self.views]

    def _split(self, stored: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(parts) == 1:
            return [stored.reshape(parts[0].shape)]
        return stored.split([part.shape[self.dim] for part in parts], self.dim)

    @property
    def is_whole(self) -> bool:
        """Whether the file holds one of our tensors as it is."""
        return self.is_rows and self.views[0].view is whole

    @property
    def is_rows(self) -> bool:
        """Whether the file holds rows of one of our tensors, each as it is."""
        view = self.views[0].view
        return len(self.views) == 1 and self.shape is None and (view is whole or isinstance(view, rows))


def renamed(names: Iterator[str], rename: Callable[[str], str]) -> Iterator[Stored]:
    """One stored tensor for each of ours."""
    for name in names:
        yield Stored(rename(name), (TensorView(name),))


@dataclass(frozen=True)
class TensorBox:
    """A box of one of our tensors. tensor: the memory for it, on any device, of any type of numbers. start: the index of its
    first number in the whole tensor."""

    tensor: Tensor
    start: tuple[int, ...]

    @property
    def box(self) -> tuple[slice, ...]:
        """Its place in the whole tensor, a slice a dimension."""
        return tuple(slice(first, first + size) for first, size in zip(self.start, self.tensor.shape, strict=True))


@torch.no_grad()
def fill_box(part: TensorBox, view: Callable[[Tensor], Tensor], piece: Tensor, shape: tuple[int, ...]) -> int:
    """Copy into a box of a tensor of `shape` those of its numbers that a view shows; returns how many.

    piece: of the file, in the view's form (`Stored.pieces`). Takes the memory of one expert at most besides.
    """
    box = part.box
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


def _fill_rows(part: TensorBox, view: rows, piece: Tensor) -> int:
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


#: Time limit in seconds for all matches of one file together; ordinary patterns take milliseconds.
_SECONDS = 2.0


class FilePatterns:
    """The regular expressions of one file. `re` would follow `(a+)+b` for ever, and hold every other thread; `regex` looks at
    the clock as it backtracks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._left = _SECONDS

    def matches(self, expression: str, name: str, setting: str, before: str = "", after: str = "") -> bool:
        """Whether the expression, between two others, matches from the name's beginning. setting: where it stands in the file.

        Raises ArtefactError for one that is no regular expression, and where the file's have taken too long.
        """
        began = time.perf_counter()
        try:
            return regex.match(before + expression + after, name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise ArtefactError(
                f"{self._path}: {setting}: {expression[:60]!r} takes more than {_SECONDS:g} s to match; write it without "
                "repetitions of repetitions"
            ) from None
        except (regex.error, RecursionError, OverflowError) as error:
            raise ArtefactError(f"{self._path}: {setting}: {expression[:60]!r} is no regular expression ({error})") from None
        finally:
            self._left -= time.perf_counter() - began
