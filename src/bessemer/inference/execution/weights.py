"""A model's weights: replaced by others, and watched for changes, which make keys and packed weights stale."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.model.decoder import Decoder
from bessemer.model.trained_adapters import LowRankUpdate


class WeightsStamp:
    """The weights of a model as they are now: which tensors, where in memory, and how often each was changed in place.

    References are weak, so that weights which were replaced are freed; unlike addresses they are never used again. What is
    written through `.data` leaves no trace.
    """

    def __init__(self, model: Decoder) -> None:
        self._stamps = [(weakref.ref(weight), _state(weight)) for weight in _weights(model)]

    def is_of(self, model: Decoder) -> bool:
        """Whether no weight was changed, moved or replaced since."""
        weights = _weights(model)
        return len(weights) == len(self._stamps) and all(
            reference() is weight and state == _state(weight)
            for (reference, state), weight in zip(self._stamps, weights, strict=True)
        )


def replace_weights(model: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Copy other weights into a model's own, by the names of its `state_dict`.

    Raises RequestError for a name or a shape that the model does not have, and changes nothing then.
    """
    own = model.state_dict()
    check_weights(weights, {name: tuple(tensor.shape) for name, tensor in own.items()})
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def check_weights(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise RequestError for a weight whose name or shape is none of a model's, given by name."""
    for name, tensor in weights.items():
        if name not in shapes:
            raise RequestError(f"the model has no weight {name!r}")
        if shapes[name] != tuple(tensor.shape):
            raise RequestError(f"weight {name!r} has shape {shapes[name]}, not {tuple(tensor.shape)}")


def _weights(model: Decoder) -> list[Tensor]:
    """Parameters and codes of quantised layers, but no tables that are computed, no codes that were released, and no adapter in
    training that is switched off."""
    parts = [module for module in model.modules() if not isinstance(module, LowRankUpdate) or module.is_on]
    parameters = dict.fromkeys(weight for part in parts for weight in part._parameters.values() if weight is not None)
    buffers = [
        buffer
        for module in parts
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    return [*parameters, *buffers]


def _state(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version
