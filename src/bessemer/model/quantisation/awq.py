"""AWQ (Lin et al. 2023, arXiv 2306.00978): before weights are rounded, inputs with large activations get larger weights.

Dividing an input by s and multiplying its weights by s changes nothing, but that the weights' rounding error then counts
1 / s. For each input s = (mean |x|)^α, or that over (mean |w|)^(1 - α), which also evens out the weights of a group; of both,
the α is taken that leaves the smallest error of the layers' outputs, each group of weights rounded within the range that does
so for the group. The division is folded into what makes the activations (`folding`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bessemer.model.decoder import Block
from bessemer.model.quantisation.folding import Fold, apply, folds_of, weight_in
from bessemer.model.quantisation.rounding import CLIPS, Grid, as_codes, best_grid, find_grid, in_groups
from bessemer.model.quantisation.statistics import Statistics
from bessemer.model.quantised_linear import Codes, Scheme

# Shapes: N outputs, K inputs, P channels of what makes them, G groups of a row, S weights of a group.

_EXPONENTS = tuple(step / 10 for step in range(11))
#: Ranges that are tried for every exponent; in the end all of `CLIPS` are.
_FEW_CLIPS = (1.0, 0.9, 0.8)


def scale_activations(
    block: Block, name: str, schemes: Mapping[str, Scheme], statistics: Mapping[str, list[Statistics]]
) -> dict[str, list[Statistics]]:
    """Scale a block's activations wherever that makes the error of its quantised readers smaller, in place.

    name: of the block in the model; schemes and statistics: of its matrices, by their names in the model. Returns the
    statistics of the inputs as they are now.
    """
    found = dict(statistics)
    for fold in folds_of(block):
        readers = [reader for reader in fold.readers if f"{name}.{reader}" in schemes]
        if not readers:
            continue
        scales_P = _best_scales(fold, block, name, readers, schemes, found)
        scales_K = apply(fold, block, scales_P)
        for reader in readers:
            found[f"{name}.{reader}"] = [one.divided(scales_K) for one in found[f"{name}.{reader}"]]
    return found


def _best_scales(
    fold: Fold,
    block: Block,
    name: str,
    readers: Sequence[str],
    schemes: Mapping[str, Scheme],
    statistics: Mapping[str, list[Statistics]],
) -> Tensor:
    """Of the scales (P) of all exponents, those with the smallest summed error; 1 where none is smaller than that."""
    pairs = [pair for reader in readers for pair in _matrices(block, name, reader, schemes, statistics)]
    seen = [statistic for _, statistic, _ in pairs]
    total = sum(statistic.count for statistic in seen)
    magnitudes_K = sum((statistic.magnitudes_K for statistic in seen), torch.zeros_like(seen[0].magnitudes_K)) / max(total, 1)
    activations_P = fold.gathered(magnitudes_K).clamp(min=1e-4)
    weights_P = fold.gathered(torch.stack([weight_NK.abs().mean(0) for weight_NK, _, _ in pairs]).mean(0)).clamp(min=1e-6)
    candidates = [activations_P**exponent for exponent in _EXPONENTS]
    candidates += [activations_P**exponent / weights_P ** (1 - exponent) for exponent in _EXPONENTS]
    best_P, least = torch.ones_like(activations_P), None
    for scales_P in candidates:
        scales_P = scales_P / (scales_P.max() * scales_P.min()).sqrt()
        scales_K = fold.spread(scales_P)
        error = 0.0
        for weight_NK, statistic, scheme in pairs:
            scaled_NK, scaled = weight_NK * scales_K, statistic.divided(scales_K)
            grid = _clipped(scaled_NK, scaled, scheme, _FEW_CLIPS)
            rounded_NK = grid.rounded(in_groups(scaled_NK, scheme), scheme).flatten(-2)
            error += _output_error(rounded_NK - scaled_NK, scaled.squares_KK)
        if least is None or error < least:
            best_P, least = scales_P, error
    return best_P


def _matrices(
    block: Block, name: str, reader: str, schemes: Mapping[str, Scheme], statistics: Mapping[str, list[Statistics]]
) -> list[tuple[Tensor, Statistics, Scheme]]:
    """A reader's matrix, or those of every expert, with what it reads and how it is quantised."""
    weight = weight_in(block, reader).detach().to(torch.float32)
    stack = weight if weight.ndim == 3 else weight[None]
    full = f"{name}.{reader}"
    return [(matrix, statistic, schemes[full]) for matrix, statistic in zip(stack, statistics[full], strict=True)]


def _output_error(difference_NK: Tensor, squares_KK: Tensor) -> float:
    """Summed squared error of the outputs, tr(Δ H Δᵀ)."""
    return float(((difference_NK @ squares_KK) * difference_NK).sum())


def round_with_clips(weight_NK: Tensor, statistics: Statistics, scheme: Scheme) -> Codes:
    """Round to nearest; for each group of weights, within the range that leaves the smallest error of the group's part of the
    outputs."""
    grid = _clipped(weight_NK, statistics, scheme, CLIPS)
    return as_codes(grid.codes(in_groups(weight_NK, scheme), scheme), grid, scheme)


def _clipped(weight_NK: Tensor, statistics: Statistics, scheme: Scheme, clips: Sequence[float]) -> Grid:
    """The grid (N, G, 1) whose groups have the range with the smallest error of their part of the outputs."""
    groups_NGS = in_groups(weight_NK, scheme)
    count, size = groups_NGS.shape[1:]
    places = torch.arange(count)
    squares_GSS = statistics.squares_KK.view(count, size, count, size)[places, :, places]

    def error_of(grid: Grid) -> Tensor:
        difference_GNS = (grid.rounded(groups_NGS, scheme) - groups_NGS).transpose(0, 1)
        return (torch.bmm(difference_GNS, squares_GSS) * difference_GNS).sum(-1, keepdim=True).transpose(0, 1)

    return best_grid((find_grid(groups_NGS, scheme, clip=clip) for clip in clips), error_of)
