"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): codes that change a layer's outputs least, rather than its weights.

The error of the outputs over calibration inputs x is tr(Δ H Δᵀ), with Δ the error of the weights and H = Σ x xᵀ. Weights are
rounded one input after the other, and what an input's rounding did wrong is made up for by the inputs that come after it, as
the inverse of H says. With U the upper Cholesky factor of H⁻¹, input i's error e = (w_i − q_i) / U_ii moves every later input
j by − e U_ij.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.model.device import in_float64
from bessemer.model.quantisation.rounding import Grid, as_codes, in_groups, search_grid
from bessemer.model.quantisation.schemes.base import Codes
from bessemer.model.quantisation.schemes.integers import IntegerScheme
from bessemer.model.quantisation.statistics import Statistics

# Shapes: N outputs, K inputs, B inputs of a block, G groups of a row, S weights of a group.

#: Inputs whose effect on those after the block is applied at once.
_BLOCK = 128


def gptq(weight_NK: Tensor, statistics: Statistics, scheme: IntegerScheme, *, damping: float, activation_order: bool) -> Codes:
    """Codes of a matrix whose inputs have these statistics.

    Scales are fixed before any weight is rounded, by a search over ranges in which an error e of input i counts e² / U_ii², as
    it will in the end: so the inputs may be taken in any order, and an order costs no index on disk. damping: share of the mean
    diagonal of H that is added to it. activation_order: the inputs with the largest Σ x² first.
    """
    weight_NK = weight_NK.to(torch.float32)
    inputs, size = weight_NK.shape[1], scheme.group_of(weight_NK.shape[1])
    hessian_KK = statistics.squares_KK / max(statistics.count, 1)
    order_K = torch.arange(inputs, device=weight_NK.device)
    if activation_order:
        order_K = hessian_KK.diagonal().argsort(descending=True, stable=True)
    factor_KK = _inverse_factor(hessian_KK[order_K][:, order_K], damping)
    importance_K = torch.empty_like(hessian_KK[0])
    importance_K[order_K] = factor_KK.diagonal() ** -2
    groups_NGS = in_groups(weight_NK, scheme)
    grid = search_grid(groups_NGS, scheme, importance_K.view(-1, size))
    rounded_NK = _round_in_order(weight_NK[:, order_K], factor_KK, _columns(grid, order_K // size), scheme)
    codes_NK = torch.empty_like(weight_NK)
    codes_NK[:, order_K] = rounded_NK
    return as_codes(codes_NK.unflatten(1, (-1, size)), grid, scheme)


def _columns(grid: Grid, group_K: Tensor) -> Grid:
    """The grid of every input, (N, K), from that of the groups, (N, G, 1)."""
    zeros = None if grid.zeros is None else grid.zeros[..., 0][:, group_K]
    return Grid(grid.scales[..., 0][:, group_K], zeros)


def _round_in_order(weight_NK: Tensor, factor_KK: Tensor, grid: Grid, scheme: IntegerScheme) -> Tensor:
    """The code of every weight, the columns taken from left to right."""
    # a column of weights is then one piece of memory
    left_KN = weight_NK.T.contiguous()
    scales_KN, zeros_KN = grid.scales.T.contiguous(), None if grid.zeros is None else grid.zeros.T.contiguous()
    codes_KN = torch.empty_like(left_KN)
    inputs = len(left_KN)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        errors_BN = torch.empty_like(left_KN[start:end])
        for place in range(start, end):
            column = Grid(scales_KN[place], None if zeros_KN is None else zeros_KN[place])
            codes_KN[place] = column.codes(left_KN[place], scheme)
            error_N = (left_KN[place] - column.weights(codes_KN[place], scheme)) / factor_KK[place, place]
            errors_BN[place - start] = error_N
            left_KN[place:end] -= torch.outer(factor_KK[place, place:end], error_N)
        left_KN[end:] -= factor_KK[start:end, end:].T @ errors_BN
    return codes_KN.T


def _inverse_factor(hessian_KK: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of H⁻¹, in float32; an input that was never there counts as one that is alone.

    Computed in float64, on the CPU where the device has none. The damping is raised where H is too near to singular.
    """
    device, hessian_KK = hessian_KK.device, in_float64(hessian_KK)
    diagonal_K = hessian_KK.diagonal()
    diagonal_K[diagonal_K == 0] = 1
    mean = float(diagonal_K.mean())
    eye_KK = torch.eye(len(diagonal_K), dtype=torch.float64, device=hessian_KK.device)
    while True:
        lower_KK, failed = torch.linalg.cholesky_ex(hessian_KK + damping * mean * eye_KK)
        if not failed:
            upper_KK, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_KK), upper=True)
            if not failed:
                return upper_KK.to(torch.float32).to(device)
        damping *= 10
