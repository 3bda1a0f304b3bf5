"""Initial weights: a pure function of the config and the seed.

Matrices and the embedding are normal with standard deviation `initializer_range` (0.02); the two projections of each
block that write to the residual stream have it divided by √(2 L), so that the stream's variance does not grow with the
L layers (Radford et al. 2019, section 2.3); norms are 1, biases and sinks 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from bessemer.core.hashing import derive_seed
from bessemer.model.attention.base import variants_in
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder

_RESIDUAL_PROJECTIONS = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Every tensor of a new decoder by its name."""
    return {name: initial_weight(name, shape, config, seed) for name, shape in tensor_shapes(config).items()}


def initial_weight(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """One tensor of a new decoder, float32. Each draws from a generator of its own, seeded by its name."""
    return _initial(name, shape, config, torch.Generator().manual_seed(derive_seed(seed, "weights", name)))


def _initial(name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator) -> Tensor:
    for variant in variants_in(config):
        for ending, draw in variant.load().initial.items():
            if name.endswith(ending):
                return draw(shape, generator)
    if name.endswith("norm.weight"):
        return torch.zeros(shape) if config.norm_offset else torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    deviation = config.initializer_range
    if name.endswith(_RESIDUAL_PROJECTIONS):
        deviation /= math.sqrt(2 * config.num_hidden_layers)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the decoder, in the order of the network."""
    return dict(_tensor_shapes(config))


# a file or an adapter is opened by its shapes again and again, and a decoder takes long to make
@lru_cache(maxsize=8)
def _tensor_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    # without rotary tables, which are no parameters and take gigabytes for long contexts
    if config.position_type == "rotary":
        config = config.with_changes(position_type="none")
    return {name: tuple(tensor.shape) for name, tensor in empty_decoder(config).state_dict().items()}


def empty_decoder(config: ModelConfig) -> Decoder:
    """A decoder that takes no memory yet: its parameters lie on the meta device."""
    with torch.device("meta"):
        return Decoder(config)


def initial_decoder(config: ModelConfig, seed: int) -> Decoder:
    """A new decoder with `initial_weights`."""
    return fill(empty_decoder(config), initial_weights(config, seed))


def fill(decoder: Decoder, weights: dict[str, Tensor]) -> Decoder:
    """Give an empty decoder its tensors, without copying them; returns it in evaluation mode."""
    decoder.load_state_dict(weights, assign=True)
    return decoder.eval()
