"""A model's weights turned into codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bessemer.core.progress import Progress, Silent
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.plan import plan
from bessemer.model.quantisation.rounding import round_to_nearest
from bessemer.model.quantisation.shells import put_shells, weight_name
from bessemer.model.quantised_linear import Codes, QuantisedWeight


@torch.no_grad()
def quantise(model: Decoder, config: QuantizeConfig, *, progress: Progress | None = None) -> list[str]:
    """Quantise a model in place; returns notes, a sentence each, on what is otherwise than was asked for.

    Raises ConfigError for a model that is quantised already.
    """
    schemes, notes = plan(model, config)
    weights = model.state_dict()
    codes: dict[str, Codes] = {}
    with (progress or Silent()).task("quantise", total=len(schemes), unit="matrices") as task:
        for name, scheme in schemes.items():
            codes[name] = round_to_nearest(weight_of(weights, name), scheme, search_clip=config.search_clip)
            task.advance()
    take_codes(model, codes)
    return notes


def weight_of(weights: Mapping[str, Tensor], module: str) -> Tensor:
    """The weight that a quantised module stands for, among a model's tensors."""
    return weights[weight_name(module)]


def take_codes(model: Decoder, codes: Mapping[str, Codes]) -> None:
    """Put codes in the place of the weights that they stand for."""
    put_shells(model, {name: one.scheme for name, one in codes.items()})
    for name, one in codes.items():
        part = model.get_submodule(name)
        assert isinstance(part, QuantisedWeight), name
        part.take(one)
