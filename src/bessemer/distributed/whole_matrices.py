"""Functions of whole matrices whose shards lie on many ranks: every rank computes some of the matrices.

The matrices that a group of ranks holds are assigned to its ranks by cost, in rounds of one a rank. In a round each rank
receives the shards of its own matrix, computes, and returns to every rank its shard of the result: two all-to-alls. Over N
ranks each computes, sends and receives an N-th of what it would if every rank gathered every matrix, and holds one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from types import EllipsisType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from bessemer.distributed.mesh import new_group

#: Most elements of a stack's matrices that a rank computes at once; a single matrix may have more.
_LARGEST_STACK = 1 << 24

#: A part of a tensor, as an index.
Slices = tuple[slice | EllipsisType, ...]
Function = Callable[[Tensor], Tensor]


class Sharded(NamedTuple):
    """A tensor of matrices, (rows, columns) or (stack, rows, columns), as a function's argument and result.

    tensor: only its layout is read. dtype: of the values that ranks exchange. parts: how many matrices are stacked along the
    rows of each. read: the argument's values in a part of this rank's shard. write: receives the result's values in a part.
    """

    tensor: DTensor
    dtype: torch.dtype
    parts: int
    read: Callable[[Slices], Tensor]
    write: Callable[[Slices, Tensor], None]


class WholeMatrices:
    """Applies functions to every matrix of sharded tensors. All ranks that hold shards of them make the same calls.

    A function maps (rows, columns) or (stack, rows, columns) to the same shape, each matrix by itself. A stack that is sharded
    between its matrices is not gathered: ranks compute those that they hold.
    """

    def __init__(self, cost: Callable[[tuple[int, ...]], float]) -> None:
        """cost: of a function on a tensor of some shape, in any unit."""
        self._cost = cost
        self._groups: dict[tuple[int, ...], Any] = {}
        #: Plans of the last call, and the ids of its tensors.
        self._plans: list[_Plan] = []
        self._planned: tuple[int, ...] = ()

    def apply(self, function: Function, tensors: Sequence[Sharded]) -> None:
        """Replace every matrix of the tensors, in place, by `function` of it."""
        identities = tuple(id(sharded.tensor) for sharded in tensors)
        if identities != self._planned:
            self._plans, self._planned = self._plan(tensors), identities
        for plan in self._plans:
            for index in plan.here:
                sharded = tensors[index]
                sharded.write((...,), of_parts(function, sharded.read((...,)), sharded.parts))
            for turn in plan.rounds:
                _run(turn, function, tensors, plan)

    def _plan(self, tensors: Sequence[Sharded]) -> list[_Plan]:
        """Tensors grouped by the ranks that hold them, and the rank that computes each of their parts."""
        by_group: dict[tuple[Any, ...], dict[int, _Holders]] = {}
        for index, (tensor, dtype, *_) in enumerate(tensors):
            holders = _holders(tensor)
            by_group.setdefault((holders.ranks, dtype, tensor.to_local().device), {})[index] = holders
        plans = []
        for (ranks, dtype, device), holders_of in by_group.items():
            nothing = torch.empty(0, dtype=dtype, device=device)
            if len(ranks) == 1:
                plans.append(_Plan(None, nothing, list(holders_of), []))
                continue
            group = self._group(tensors[next(iter(holders_of))].tensor, ranks)
            rounds = [
                _round(owned, holders_of, dist.get_rank(group), len(ranks))
                for owned in self._assigned(tensors, holders_of, len(ranks))
            ]
            plans.append(_Plan(group, nothing, [], rounds))
        return plans

    def _assigned(self, tensors: Sequence[Sharded], holders_of: dict[int, _Holders], ranks: int) -> Iterator[dict[int, _Unit]]:
        """Rounds of units of similar cost, one a rank. The longest units of all rounds add up to at most the mean work of a
        rank and one more unit."""
        units = [unit for index, holders in holders_of.items() for unit in _units(index, tensors[index], holders)]
        units.sort(key=lambda unit: -self._cost(unit.shape))
        for number, start in enumerate(range(0, len(units), ranks)):
            # in alternating order, so that no rank always gets the longest
            order = range(ranks) if number % 2 == 0 else reversed(range(ranks))
            yield dict(zip(order, units[start : start + ranks], strict=False))

    def _group(self, tensor: DTensor, ranks: tuple[int, ...]) -> Any:
        """The process group of some ranks of a tensor's mesh."""
        if ranks not in self._groups:
            mesh = tensor.device_mesh
            known = [dist.group.WORLD, *(mesh.get_group(axis) for axis in range(mesh.ndim))]
            group = next((each for each in known if tuple(dist.get_process_group_ranks(each)) == ranks), None)
            if group is None:
                # a group over several axes; other ranks do not take part
                group = new_group(list(ranks), use_local_synchronization=True)
            self._groups[ranks] = group
        return self._groups[ranks]


def of_parts(function: Function, matrices: Tensor, parts: int) -> Tensor:
    """The function of every matrix of a whole tensor, `parts` of which are stacked along the rows of each."""
    if parts == 1:
        return function(matrices)
    stack = matrices.unflatten(-2, (parts, -1)).flatten(0, -3)
    return function(stack).reshape(matrices.shape)


# ------------------------------------------------------------------------------------------------------------ who holds what


class _Region(NamedTuple):
    """The rows and columns of every matrix that a rank holds."""

    rows: range
    columns: range


class _Holders(NamedTuple):
    """The ranks that hold shards of the same matrices, ascending; of each its region, and which of several copies it has.
    stack: number of matrices of the stack; None of a plain matrix."""

    ranks: tuple[int, ...]
    regions: tuple[_Region, ...]
    copies: tuple[tuple[int, ...], ...]
    stack: int | None


def _holders(tensor: DTensor) -> _Holders:
    mesh, own, shape = tensor.device_mesh, tensor.device_mesh.get_coordinate(), tensor.to_local().shape
    assert own is not None and not any(placement.is_partial() for placement in tensor.placements)
    dims = [_dim(placement) for placement in tensor.placements]
    stacked = tensor.ndim - 2
    places = [
        [place] if dim is not None and dim < stacked else list(range(mesh.size(axis)))
        for axis, (dim, place) in enumerate(zip(dims, own, strict=True))
    ]
    placements = []
    for coordinate in product(*places):
        bounds = _bounds(tensor, dims, coordinate)
        assert coordinate != tuple(own) or [*map(len, bounds)] == [*shape], (bounds, shape)
        copy = tuple(place for dim, place in zip(dims, coordinate, strict=True) if dim is None)
        placements.append((int(mesh.mesh[coordinate]), _Region(*bounds[-2:]), copy))
    ranks, regions, copies = zip(*sorted(placements, key=lambda each: each[0]), strict=True)
    return _Holders(ranks, regions, copies, shape[0] if stacked else None)


def _bounds(tensor: DTensor, dims: Sequence[int | None], coordinate: tuple[int, ...]) -> list[range]:
    """The indices of each dimension that the rank at a place of the mesh holds.

    Axes shard from left to right, except FSDP's, which shards what the tensor axis to its right has left (`_StridedShard`).
    """
    bounds = [range(size) for size in tensor.shape]
    axes = [(axis, dim) for axis, dim in enumerate(dims) if dim is not None]
    last = [each for each in axes if hasattr(tensor.placements[each[0]], "split_factor")]
    for axis, dim in [each for each in axes if each not in last] + last[::-1]:
        size = -(-len(bounds[dim]) // tensor.device_mesh.size(axis))
        bounds[dim] = bounds[dim][coordinate[axis] * size : (coordinate[axis] + 1) * size]
    return bounds


def _dim(placement: Any) -> int | None:
    """The dimension that a placement shards; None where it replicates."""
    return None if placement.is_replicate() else placement.dim


# -------------------------------------------------------------------------------------------------------- who computes what


class _Unit(NamedTuple):
    """Matrices that one rank computes at once: these rows of a tensor, for a part of its stack.

    tensor: its place among the arguments. shape: of all of the unit.
    """

    tensor: int
    stack: slice | None
    rows: range
    shape: tuple[int, ...]


class _Piece(NamedTuple):
    """A rank's piece of a unit: its shape, and its place in the unit and in the rank's shard.

    tensor: as of the unit. given: whether the unit's owner gets it from this rank, and not from one with a copy.
    """

    tensor: int
    shape: tuple[int, ...]
    in_unit: Slices
    in_shard: Slices
    given: bool


class _Round(NamedTuple):
    """One unit a rank. own: the shape of this rank's. of_own: what every rank holds of it. of_others: what this rank holds of
    every rank's unit. None where there is no unit."""

    own: tuple[int, ...] | None
    of_own: list[_Piece | None]
    of_others: list[_Piece | None]


class _Plan(NamedTuple):
    """Tensors that the same ranks hold: indices of those that this rank computes alone, or rounds. nothing: an empty tensor of
    what is exchanged."""

    group: Any
    nothing: Tensor
    here: list[int]
    rounds: list[_Round]


def _units(index: int, sharded: Sharded, holders: _Holders) -> Iterator[_Unit]:
    rows, columns = sharded.tensor.shape[-2:]
    height = rows // sharded.parts
    for first in range(0, rows, height):
        part = range(first, first + height)
        if holders.stack is None:
            yield _Unit(index, None, part, (height, columns))
            continue
        # enough for every rank, and few enough for memory
        even = -(-holders.stack * sharded.parts // len(holders.ranks))
        each = max(1, min(even, _LARGEST_STACK // (height * columns)))
        for start in range(0, holders.stack, each):
            stack = slice(start, min(start + each, holders.stack))
            yield _Unit(index, stack, part, (stack.stop - start, height, columns))


def _round(owned: dict[int, _Unit], holders_of: dict[int, _Holders], me: int, ranks: int) -> _Round:
    own = owned.get(me)
    of_own: list[_Piece | None] = [None] * ranks
    if own is not None:
        of_own = [_piece(own, holders_of[own.tensor], rank, me) for rank in range(ranks)]
    of_others = [
        _piece(owned[owner], holders_of[owned[owner].tensor], me, owner) if owner in owned else None for owner in range(ranks)
    ]
    return _Round(None if own is None else own.shape, of_own, of_others)


def _piece(unit: _Unit, holders: _Holders, rank: int, owner: int) -> _Piece:
    rows, columns = holders.regions[rank]
    start = max(unit.rows.start, rows.start)
    count = max(0, min(unit.rows.stop, rows.stop) - start)

    def rows_from(origin: int) -> slice:
        return slice(start - origin, start - origin + count) if count else slice(0, 0)

    in_unit = (..., rows_from(unit.rows.start), slice(columns.start, columns.stop))
    in_shard = (*(() if unit.stack is None else (unit.stack,)), rows_from(rows.start), slice(None))
    shape = (*unit.shape[:-2], count, len(columns))
    return _Piece(unit.tensor, shape, in_unit, in_shard, holders.copies[rank] == holders.copies[owner])


def _run(turn: _Round, function: Function, tensors: Sequence[Sharded], plan: _Plan) -> None:
    """Compute one round."""
    given = [tensors[piece.tensor].read(piece.in_shard) if piece and piece.given else plan.nothing for piece in turn.of_others]
    received = _exchange(given, [piece.shape if piece and piece.given else (0,) for piece in turn.of_own], plan)
    results = [plan.nothing] * len(received)
    if turn.own is not None:
        whole = plan.nothing.new_empty(turn.own)
        for piece, values in zip(turn.of_own, received, strict=True):
            assert piece is not None
            if piece.given:
                whole[piece.in_unit] = values
        whole = function(whole)
        results = [whole[piece.in_unit] for piece in turn.of_own if piece is not None]
    returned = _exchange(results, [piece.shape if piece else (0,) for piece in turn.of_others], plan)
    for piece, values in zip(turn.of_others, returned, strict=True):
        if piece is not None:
            tensors[piece.tensor].write(piece.in_shard, values)


def _exchange(sent: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], plan: _Plan) -> Sequence[Tensor]:
    """All-to-all: returns the tensor of each rank for this one, in these shapes. sent: this rank's tensors for the others."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    incoming = plan.nothing.new_empty(sum(sizes))
    outgoing = torch.cat([piece.to(incoming.dtype).flatten() for piece in sent])
    dist.all_to_all_single(incoming, outgoing, sizes, [piece.numel() for piece in sent], group=plan.group)
    return [values.view(shape) for values, shape in zip(incoming.split(sizes), shapes, strict=True)]
