"""Round-to-nearest quantisation: a scale for each group, then the nearest code for each weight.

Plain rounding takes the scale at which the group's extremes are the extreme codes. The clip search tries smaller ranges, in
which the extremes are cut off and everything else is finer, and keeps for each group the one with the smallest squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bessemer.model.quantisation.packing import pack
from bessemer.model.quantisation.schemes.base import Codes

if TYPE_CHECKING:
    from bessemer.model.quantisation.schemes.integers import IntegerScheme

# Shapes: N outputs, K inputs, G groups of a row, S weights of a group.

#: Shares of a group's range that the clip search tries, 1 included.
CLIPS = tuple(1 - step / 40 for step in range(21))
#: The zero of codes that are symmetric at 4 bits.
MIDDLE = 8
#: The largest code of int8. Weights do without −128, so that a code can change its sign.
LARGEST_INT8 = 127
_LARGEST_INT4 = 15
_HALF_RANGE_INT4 = 7.5


class Grid(NamedTuple):
    """Scales, and zeros where the scheme has its own, of groups (…, 1): what turns a weight into a code."""

    scales: Tensor
    zeros: Tensor | None

    def codes(self, weights: Tensor, scheme: IntegerScheme) -> Tensor:
        """The nearest code of each weight, as a float."""
        steps = weights / self.scales.where(self.scales != 0, 1)
        if scheme.bits == 8:
            return steps.round().clamp(-LARGEST_INT8, LARGEST_INT8)
        zeros = MIDDLE if self.zeros is None else self.zeros
        return (steps.round() + zeros).clamp(0, _LARGEST_INT4)

    def weights(self, codes: Tensor, scheme: IntegerScheme) -> Tensor:
        """What codes stand for."""
        if scheme.bits == 4:
            codes = codes - (MIDDLE if self.zeros is None else self.zeros)
        return codes * self.scales

    def rounded(self, weights: Tensor, scheme: IntegerScheme) -> Tensor:
        """Each weight as its nearest code stands for."""
        return self.weights(self.codes(weights, scheme), scheme)


def find_grid(groups: Tensor, scheme: IntegerScheme, *, clip: float | Tensor = 1.0) -> Grid:
    """The grid of groups of weights, float32 (…, S), whose range is cut to `clip` of what it is; of a negative one the scale is
    negative, and the code that has no opposite, −8, serves the other sign.

    Symmetric: the largest magnitude becomes ±127, or ±7.5 at 4 bits (whose codes go from −8 to 7). Asymmetric: the smallest
    becomes 0, the largest 15, and 0 lies on a code. Scales are rounded to float16.
    """
    if scheme.zero == "fixed":
        largest = groups.abs().amax(-1, keepdim=True) * clip
        return Grid(_as_float16(largest / (LARGEST_INT8 if scheme.bits == 8 else _HALF_RANGE_INT4)), None)
    low = groups.amin(-1, keepdim=True).clamp(max=0) * clip
    high = groups.amax(-1, keepdim=True).clamp(min=0) * clip
    scales = _as_float16((high - low) / _LARGEST_INT4)
    zeros = (-low / scales.where(scales != 0, 1)).round().clamp(0, _LARGEST_INT4)
    return Grid(scales, zeros)


def _as_float16(scales: Tensor) -> Tensor:
    largest = torch.finfo(torch.float16).max
    return scales.clamp(-largest, largest).to(torch.float16).to(torch.float32)


def search_grid(groups: Tensor, scheme: IntegerScheme, importance: Tensor | None = None) -> Grid:
    """Of the grids of `CLIPS`, for each group the one with the smallest squared error of its weights.

    importance: weighs the squared errors, broadcast to the groups (…, S).
    """

    def error_of(grid: Grid) -> Tensor:
        squares = (grid.rounded(groups, scheme) - groups).square()
        return (squares if importance is None else squares * importance).sum(-1, keepdim=True)

    return best_grid((find_grid(groups, scheme, clip=clip) for clip in CLIPS), error_of)


def best_grid(grids: Iterable[Grid], error_of: Callable[[Grid], Tensor]) -> Grid:
    """For each group, the grid with the smallest error, (…, 1); the first of equals."""
    best: Grid | None = None
    least = torch.empty(0)
    for grid in grids:
        error = error_of(grid)
        if best is None:
            best, least = grid, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        zeros = None if best.zeros is None or grid.zeros is None else torch.where(better, grid.zeros, best.zeros)
        best = Grid(torch.where(better, grid.scales, best.scales), zeros)
    assert best is not None
    return best


def in_groups(weight: Tensor, scheme: IntegerScheme) -> Tensor:
    """Weights (…, K) as float32 groups (…, G, S)."""
    return weight.to(torch.float32).unflatten(-1, (-1, scheme.group_of(weight.shape[-1])))


def as_codes(codes: Tensor, grid: Grid, scheme: IntegerScheme) -> Codes:
    """Codes as floats (…, G, S), and their grid (…, G, 1), in the form in which they are kept."""
    flat = codes.flatten(-2)
    whole = flat.to(torch.int8) if scheme.bits == 8 else pack(flat.to(torch.uint8))
    zeros = {} if grid.zeros is None else {"zeros": grid.zeros[..., 0].to(torch.uint8)}
    return Codes(scheme, {"codes": whole.contiguous(), "scales": grid.scales[..., 0].contiguous(), **zeros})


def round_to_nearest(weight: Tensor, scheme: IntegerScheme, *, search_clip: bool = False) -> Codes:
    """A matrix (…, N, K) as codes; with `search_clip` by `search_grid`, else plainly (the baseline called RTN)."""
    groups = in_groups(weight, scheme)
    grid = search_grid(groups, scheme) if search_clip else find_grid(groups, scheme)
    return as_codes(grid.codes(groups, scheme), grid, scheme)
