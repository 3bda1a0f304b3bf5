"""The registry of attention variants: `full_attention` and `sliding_attention` are grouped-query or latent, `linear_attention`
is gated DeltaNet.

A variant carries what depends on it: names and figures in its file here, without PyTorch, and the module in `model/layers/`,
which shards itself and says where adapters and scales go in. The rest of the code asks the variant of a layer.
"""

from __future__ import annotations

from bessemer.model.architecture import DecoderShape, LayerType
from bessemer.model.attention.base import AttentionVariant
from bessemer.model.attention.delta_net import DeltaNet
from bessemer.model.attention.grouped_query import GroupedQuery
from bessemer.model.attention.latent import Latent

VARIANTS: tuple[AttentionVariant, ...] = (GroupedQuery(), Latent(), DeltaNet())


def variant_of_type(config: DecoderShape, layer_type: LayerType) -> AttentionVariant:
    """The variant of the layers of a type."""
    return next(variant for variant in VARIANTS if variant.is_used(config, layer_type))


def variant_of(config: DecoderShape, layer: int) -> AttentionVariant:
    """The variant of a layer."""
    return variant_of_type(config, config.types[layer])


def variants_in(config: DecoderShape) -> list[AttentionVariant]:
    """The variants that a model's layers have, in the registry's order."""
    types = set(config.types)
    return [variant for variant in VARIANTS if any(variant.is_used(config, layer_type) for layer_type in types)]


def is_recurrent(config: DecoderShape) -> bool:
    """Whether some layer carries a state from token to token."""
    return any(variant.recurrent for variant in variants_in(config))
