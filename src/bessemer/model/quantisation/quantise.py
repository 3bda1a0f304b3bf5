"""Quantises a model's weights, by rounding to nearest, AWQ or GPTQ.

The plan gives each weight its scheme. GPTQ (Frantar et al. 2022, arXiv 2210.17323) chooses the codes that change a layer's
outputs least, rather than its weights. The error of the outputs over calibration inputs x is tr(Δ H Δᵀ), with Δ the error of
the weights and H = Σ x xᵀ. Weights are rounded one input after the other, and later inputs make up for the rounding error of
earlier ones. With U the upper Cholesky factor of H⁻¹, input i's error e = (w_i − q_i) / U_ii moves every later input j by
− e U_ij.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.core.progress import Progress, Silent, Task
from bessemer.model.decoder import Decoder
from bessemer.model.device import in_float64
from bessemer.model.quantisation.awq import round_with_clips, scale_activations, weight_in
from bessemer.model.quantisation.base import Codes, Scheme
from bessemer.model.quantisation.calibration import Fed, Statistics, fed_blocks, gather, steps_of
from bessemer.model.quantisation.config import SCHEMES, QuantizeConfig
from bessemer.model.quantisation.integers import Grid, IntegerScheme, as_codes, in_groups, search_grid
from bessemer.model.quantisation.quantised_decoder import (
    EMBEDDING,
    HEAD,
    quantisable,
    replace_with_quantised_modules,
    weight_name,
)
from bessemer.model.quantisation.quantised_layers import QuantisedWeight, is_quantised


class Plan(NamedTuple):
    """The scheme of every weight that will be quantised, by its module; and notes on deviations from the settings."""

    schemes: dict[str, Scheme]
    notes: list[str]


def plan(model: Decoder, config: QuantizeConfig) -> Plan:
    """Raises ConfigError when the model is quantised already."""
    if is_quantised(model):
        raise ConfigError("this model is quantised already; quantise the one that it was made from")
    schemes: dict[str, Scheme] = {}
    deviations: Counter[tuple[int, str]] = Counter()
    chosen = SCHEMES.find(config.scheme).load()
    for name, shape in quantisable(model):
        schemes[name], deviation = chosen.choose(shape[-1], config)
        if deviation is not None:
            deviations[shape[-1], deviation] += 1
    if config.head != "none":
        of_ends, _ = SCHEMES.find(config.head).load().choose(model.config.hidden_size, config, is_end=True)
        schemes |= {name: of_ends for name in (EMBEDDING, HEAD) if hasattr(model, name)}
    notes = [f"{count} matrices with {inputs:,} inputs, {how}" for (inputs, how), count in deviations.items()]
    return Plan(schemes, notes)


# Shapes: N outputs, K inputs, B inputs of a block, G groups of a row, S weights of a group.

#: Inputs of a block of columns; its rounding errors are applied to the later columns together.
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
    # transposed, so that a column of weights is contiguous
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


# Shapes: R rows of calibration text, T time, N outputs, K inputs, E experts.

#: An expert that fewer vectors than this share of its inputs has visited is rounded to nearest.
_LEAST_VISITS = 0.25


@torch.no_grad()
def quantise(
    model: Decoder, config: QuantizeConfig, rows_RT: Tensor | None = None, *, progress: Progress | None = None
) -> list[str]:
    """Quantise a model in place; returns notes, a sentence each, on deviations from the settings.

    rows_RT: calibration text as token ids, needed by the methods that are calibrated. Raises ConfigError for a model that is
    quantised already.
    """
    schemes, notes = plan(model, config)
    codes: dict[str, Codes] = {}
    with (progress or Silent()).task("quantise", total=len(schemes), unit="matrices") as task:
        if config.is_calibrated:
            assert rows_RT is not None, "gptq and awq need calibration text"
            codes |= _calibrated(model, config, schemes, rows_RT, notes, task)
        weights = model.state_dict()
        rest = [name for name in schemes if name not in codes]
        for name in rest:
            codes[name] = schemes[name].quantise(weight_of(weights, name), search_clip=config.search_clip)
            task.advance()
        of_mtp = sum(name not in (EMBEDDING, HEAD) for name in rest)
        if config.is_calibrated and of_mtp:
            notes.append(f"{of_mtp} matrices of MTP modules are rounded to nearest")
    take_codes(model, codes)
    return notes


def _calibrated(
    model: Decoder, config: QuantizeConfig, schemes: Mapping[str, Scheme], rows_RT: Tensor, notes: list[str], task: Task
) -> dict[str, Codes]:
    """The codes of the blocks' matrices; the model's weights become what the codes stand for, so that each block is
    calibrated behind quantised ones."""
    codes: dict[str, Codes] = {}
    seldom = 0
    integers = {name: scheme for name, scheme in schemes.items() if isinstance(scheme, IntegerScheme)}
    for fed in fed_blocks(model, rows_RT):
        names = [name for name in integers if name.startswith(f"{fed.name}.")]
        steps = steps_of(fed, names)
        # a block's inputs are scaled before any of its matrices is rounded
        if config.method == "awq":
            scaled = scale_activations(fed, integers, gather(fed, names, Statistics))
        for step in steps:
            statistics = gather(fed, step, Statistics) if config.method == "gptq" else {name: scaled[name] for name in step}
            for name in step:
                codes[name], unvisited = _round(fed, name, integers[name], statistics[name], config)
                seldom += unvisited
                task.advance(note=name)
    if seldom:
        notes.append(f"{seldom} matrices of experts that hardly any calibration token visits are rounded to nearest")
    return codes


def _round(
    fed: Fed, name: str, scheme: IntegerScheme, statistics: list[Statistics], config: QuantizeConfig
) -> tuple[Codes, int]:
    """The codes of a matrix or of a stack of experts', which take the weight's place; and how many were hardly visited."""
    weight = weight_in(fed.block, name.removeprefix(f"{fed.name}."))
    stack = weight.data if weight.ndim == 3 else weight.data[None]
    found, seldom = [], 0
    for matrix_NK, statistic in zip(stack, statistics, strict=True):
        if weight.ndim == 3 and statistic.count < _LEAST_VISITS * matrix_NK.shape[1]:
            seldom += 1
            found.append(scheme.quantise(matrix_NK))
        elif config.method == "gptq":
            found.append(gptq(matrix_NK, statistic, scheme, damping=config.damping, activation_order=config.activation_order))
        else:
            found.append(round_with_clips(matrix_NK.to(torch.float32), statistic, scheme))
    whole = Codes.stack(found) if weight.ndim == 3 else found[0]
    weight.data = whole.dequantised().to(weight.dtype)
    return whole, seldom


def weight_of(weights: Mapping[str, Tensor], module: str) -> Tensor:
    """The weight that a quantised module stands for, among a model's tensors."""
    return weights[weight_name(module)]


def take_codes(model: Decoder, codes: Mapping[str, Codes]) -> None:
    """Put codes in the place of the weights that they stand for."""
    replace_with_quantised_modules(model, {name: one.scheme for name, one in codes.items()})
    for name, one in codes.items():
        part = model.get_submodule(name)
        assert isinstance(part, QuantisedWeight), name
        part.take(one)
