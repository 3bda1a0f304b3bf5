"""The layout of a quantised model's tensors in the files of its family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.families import OWN, family_of
from bessemer.model.families.base import Family
from bessemer.model.families.layout import Stored
from bessemer.model.initialisation import empty_decoder
from bessemer.model.quantisation.quantised_modules import EMBEDDING, HEAD, quantisable, weight_name
from bessemer.model.quantisation.schemes.base import Scheme
from bessemer.model.quantisation.settings import OWN_FORM, compressed_settings, own_settings, read_schemes
from bessemer.model.quantisation.stored import StoredPart, compressed_parts, fits_compressed_tensors, own_parts
from bessemer.model.quantised_linear import quantised_parts


class Layout(NamedTuple):
    """The tensors of the files: those that are as in any model, those of codes; and the settings that say so.

    config: as the files give it.
    """

    plain: list[Stored]
    parts: list[StoredPart]
    settings: dict[str, Any]
    config: ModelConfig


class _Names(NamedTuple):
    """The network without its codes: tensors of the family's files, and our names."""

    stored: list[Stored]
    # by the tensor's name, the module of every weight that may be quantised
    modules: dict[str, str]
    # by the module
    shapes: dict[str, tuple[int, ...]]
    # tensors that are weights of linear layers, experts' included
    linear: list[str]


def _names(config: ModelConfig, family: Family) -> _Names:
    decoder = empty_decoder(config)
    shapes = dict(quantisable(decoder))
    for name in (EMBEDDING, HEAD):
        if hasattr(decoder, name):
            shapes[name] = tuple(getattr(decoder, name).weight.shape)
    modules = {weight_name(name): name for name in shapes}
    linear = [f"{name}.weight" for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    linear += [name for name in modules if not name.endswith(".weight")]
    stored = list(family.stored(config, list(decoder.state_dict())))
    return _Names(stored, modules, shapes, linear)


def quantisable_weights(config: ModelConfig) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The module of every weight that may be quantised, by its tensor's name, and its shape by the module."""
    names = _names(config, OWN)
    return names.modules, names.shapes


def layout_of(config: ModelConfig, schemes: Mapping[str, Scheme]) -> Layout:
    """The files of a model whose weights have these schemes, by module."""
    family, tied = family_of(config), config.tie_word_embeddings
    names = _names(config, family)
    modules = {tensor: module for tensor, module in names.modules.items() if module in schemes}
    if fits_compressed_tensors(names.stored, schemes, modules):
        settings = compressed_settings(names.stored, schemes, modules, names.linear, tied)
        return _laid_out(config, names, schemes, settings)
    return _laid_out(
        config.with_changes(model_type=OWN.model_type), _names(config, OWN), schemes, own_settings(schemes, family.model_type)
    )


def read_layout(config: ModelConfig, settings: Mapping[str, Any], path: Path) -> tuple[Layout, dict[str, Scheme]]:
    """The files that these settings of `path` describe, and the schemes by module. Raises ArtefactError as `read_schemes`."""
    names = _names(config, OWN if settings["quant_method"] == OWN_FORM else family_of(config))
    schemes = read_schemes(settings, names.stored, names.modules, names.linear, path)
    return _laid_out(config, names, schemes, dict(settings)), schemes


def _laid_out(config: ModelConfig, names: _Names, schemes: Mapping[str, Scheme], settings: dict[str, Any]) -> Layout:
    own = settings["quant_method"] == OWN_FORM
    plain: list[Stored] = []
    parts: list[StoredPart] = []
    for one in names.stored:
        module = names.modules.get(one.places[0].name)
        if module is None or module not in schemes:
            plain.append(one)
        elif not own:
            parts += compressed_parts(one, module, schemes[module], names.shapes[module], config.tie_word_embeddings)
    if own:
        for module, scheme in schemes.items():
            parts += own_parts(module, scheme, names.shapes[module])
    return Layout(plain, parts, settings, config)


def schemes_of(decoder: Decoder) -> dict[str, Scheme]:
    """The scheme of every quantised weight of a decoder, by its module."""
    return {name: part.scheme for name, part in quantised_parts(decoder).items()}
