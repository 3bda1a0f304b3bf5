"""Quantises a model's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bessemer.core.progress import Progress, Silent, Task
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.awq import round_with_clips, scale_activations
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.folding import weight_in
from bessemer.model.quantisation.gptq import gptq
from bessemer.model.quantisation.plan import plan
from bessemer.model.quantisation.quantised_modules import EMBEDDING, HEAD, replace_with_quantised_modules, weight_name
from bessemer.model.quantisation.schemes.base import Codes, Scheme
from bessemer.model.quantisation.schemes.integers import IntegerScheme
from bessemer.model.quantisation.statistics import Fed, Statistics, fed_blocks, gather, steps_of
from bessemer.model.quantised_linear import QuantisedWeight

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
            scaled = scale_activations(fed, integers, gather(fed, names))
        for step in steps:
            statistics = gather(fed, step) if config.method == "gptq" else {name: scaled[name] for name in step}
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
