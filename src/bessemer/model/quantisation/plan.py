"""The quantisation plan: the scheme of each weight of a model."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from bessemer.core.errors import ConfigError
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantised_modules import EMBEDDING, HEAD, quantisable
from bessemer.model.quantisation.registry import SCHEMES
from bessemer.model.quantisation.schemes.base import Scheme
from bessemer.model.quantised_linear import is_quantised


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
