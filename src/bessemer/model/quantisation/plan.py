"""The quantisation plan: the scheme of each weight of a model."""

from __future__ import annotations

from typing import NamedTuple

from bessemer.core.errors import ConfigError
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.config import GROUP_SIZES, QuantizeConfig
from bessemer.model.quantisation.quantised_modules import EMBEDDING, HEAD, quantisable
from bessemer.model.quantised_linear import Scheme, is_quantised

_BYTE_WISE = Scheme(8)


class Plan(NamedTuple):
    """The scheme of every weight that will be quantised, by its module; and notes on deviations from the settings."""

    schemes: dict[str, Scheme]
    notes: list[str]


def plan(model: Decoder, config: QuantizeConfig) -> Plan:
    """Raises ConfigError when the model is quantised already."""
    if is_quantised(model):
        raise ConfigError("this model is quantised already; quantise the one that it was made from")
    schemes: dict[str, Scheme] = {}
    other: dict[int, list[str]] = {}
    shapes = dict(quantisable(model))
    for name, shape in shapes.items():
        schemes[name] = _scheme(config.scheme, shape[-1], config)
        if schemes[name].group_size != _asked(config):
            other.setdefault(shape[-1], []).append(name)
    if config.head != "none":
        for name in (EMBEDDING, HEAD):
            if hasattr(model, name):
                schemes[name] = _scheme(config.head, model.config.hidden_size, config, head=True)
    notes = []
    for inputs, names in other.items():
        scheme = schemes[names[0]]
        given = f"groups of {scheme.group_size}" if scheme.group_size else "8 bits, a scale for each output"
        notes.append(f"{len(names)} matrices with {inputs:,} inputs, which {_asked(config)} does not divide: {given}")
    return Plan(schemes, notes)


def _asked(config: QuantizeConfig) -> int | None:
    return config.group_size or (GROUP_SIZES[0] if config.scheme == "int4" else None)


def _scheme(kind: str, inputs: int, config: QuantizeConfig, *, head: bool = False) -> Scheme:
    """The scheme of a matrix with `inputs` inputs: with the largest group of those allowed that divides them."""
    if kind == "w8a8":
        return Scheme(8, activation_bits=8)
    asked = GROUP_SIZES[0] if kind == "int4" and config.scheme != "int4" else _asked(config)
    if kind == "int8":
        asked = None if head else asked
        sizes = [size for size in GROUP_SIZES if asked is not None and size <= asked and inputs % size == 0]
        return Scheme(8, sizes[0] if sizes else None)
    sizes = [size for size in GROUP_SIZES if asked is not None and size <= asked and inputs % size == 0]
    return Scheme(4, sizes[0], "fixed" if config.symmetric else "code") if sizes else _BYTE_WISE
