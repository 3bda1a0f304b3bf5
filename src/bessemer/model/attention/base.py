"""An attention variant: everything that depends on which kind of attention a layer has, apart from its module. No PyTorch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

from bessemer.model.architecture import DecoderShape
from bessemer.model.attention import VARIANTS, LayerType
from bessemer.model.parts import ModelPart, Numerics, StoredActivations


class KeyValueShape(NamedTuple):
    """Keys and values of one token in one layer: heads, and channels of a key and of a value.

    shared: the values are the first channels of the keys.
    """

    heads: int
    key_width: int
    value_width: int
    shared: bool = False

    @property
    def numbers(self) -> int:
        """Numbers stored per token."""
        return self.heads * (self.key_width + (0 if self.shared else self.value_width))


class AttentionVariant(ABC):
    """One kind of attention: its tensors, costs, cache and place in a layout. `layer` names the module that computes it.

    Attention with keys and values overrides `cache_shape` and `training_shape`; attention with a state, which is `recurrent`,
    overrides `state_bytes`.
    """

    #: In messages: "it has …".
    noun: ClassVar[str]
    #: `module:class` of its `AttentionLayer`, imported when a decoder is made.
    layer: ClassVar[str]
    #: Name of that module in a block, as in Hugging Face's folders.
    attribute: ClassVar[str] = "self_attn"
    #: Whether a state is carried from token to token in place of keys and values. Such a layer has no positions, no mask and no
    #: weights to show; its state cannot be taken back, and rows cannot be cut.
    recurrent: ClassVar[bool] = False
    #: Whether its matmuls read their input in autocast's dtype.
    casts_input: ClassVar[bool] = True
    #: Whether the compiled step of `cpu_kernels` computes it.
    in_compiled_step: ClassVar[bool] = False
    #: Whether families of Hugging Face may have it; otherwise only Bessemer's own form of a folder holds it.
    in_families: ClassVar[bool] = False
    #: Why ONNX, whose caches are keys and values of heads, cannot hold it; None where it can.
    not_in_onnx: ClassVar[str | None] = "a kind of attention that its writer does not know"
    #: Settings of `Architecture` that only this variant reads.
    settings: ClassVar[tuple[str, ...]] = ()
    #: Settings that the tensor axis must divide.
    divided_by_tensor: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def is_used(self, config: DecoderShape, layer_type: LayerType) -> bool:
        """Whether layers of a type have this variant. Exactly one variant answers yes."""

    @abstractmethod
    def description(self, config: DecoderShape, layer_type: LayerType) -> str:
        """The layer in a few words, for the table of layers."""

    @abstractmethod
    def parts(self, config: DecoderShape) -> list[ModelPart]:
        """Its tensors."""

    @abstractmethod
    def mixing_flops(self, config: DecoderShape, visible: int) -> int:
        """FLOPs of a training token, forward and backward, besides products with weights. visible: positions it attends to."""

    @abstractmethod
    def activations(self, config: DecoderShape, visible: int, numerics: Numerics, *, fused: bool) -> StoredActivations:
        """Activations of one token stored for the backward pass, norms on the residual stream apart.

        visible: positions whose scores are stored where no kernel fuses them. fused: whether the device has a fused kernel for
        keys that are wider than values.
        """

    @abstractmethod
    def recomputed_from(self, config: DecoderShape, visible: int, numerics: Numerics, *, fused: bool) -> StoredActivations:
        """What selective recomputation stores: outputs of matmuls and of attention."""

    def cache_shape(self, config: DecoderShape, ranks: int = 1) -> KeyValueShape | None:
        """What a cache keeps of a token, on one of `ranks` processes that share the heads; None where it keeps a state."""
        return None

    def training_shape(self, config: DecoderShape) -> KeyValueShape | None:
        """Keys and values of a token in training; None where there are none."""
        return None

    def state_bytes(self, config: DecoderShape, itemsize: int) -> int:
        """Bytes of the state of one sequence in one layer, all heads. itemsize: bytes of a number of the model's dtype."""
        return 0

    def load(self) -> Any:
        """The class of its module, an `AttentionLayer`."""
        module, _, name = self.layer.partition(":")
        return getattr(import_module(module), name)


@cache
def variants() -> tuple[AttentionVariant, ...]:
    """All variants, in the registry's order."""
    named = (name.split(":") for name in VARIANTS)
    return tuple(getattr(import_module(f"bessemer.model.attention.{module}"), name)() for module, name in named)


def variant_of_type(config: DecoderShape, layer_type: LayerType) -> AttentionVariant:
    """The variant of the layers of a type."""
    return next(variant for variant in variants() if variant.is_used(config, layer_type))


def variant_of(config: DecoderShape, layer: int) -> AttentionVariant:
    """The variant of a layer."""
    return variant_of_type(config, config.types[layer])


def variants_in(config: DecoderShape) -> list[AttentionVariant]:
    """The variants that a model's layers have, in the registry's order."""
    types = set(config.types)
    return [variant for variant in variants() if any(variant.is_used(config, layer_type) for layer_type in types)]


def is_recurrent(config: DecoderShape) -> bool:
    """Whether some layer carries a state from token to token."""
    return any(variant.recurrent for variant in variants_in(config))
