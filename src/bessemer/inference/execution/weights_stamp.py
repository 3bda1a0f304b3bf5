"""Whether a model's weights are still those that pages were computed with, and that were packed."""

from __future__ import annotations

import weakref

from torch import Tensor

from bessemer.model.decoder import Decoder


class WeightsStamp:
    """The weights of a model as they are now: which tensors, where in memory, and how often each was changed in place.

    References are weak, so that weights which were replaced are freed; unlike addresses they are never used again. What is
    written through `.data` leaves no trace.
    """

    def __init__(self, model: Decoder) -> None:
        self._seen = [(weakref.ref(weight), _state(weight)) for weight in _weights(model)]

    def is_of(self, model: Decoder) -> bool:
        """Whether no weight was changed, moved or replaced since."""
        weights = _weights(model)
        return len(weights) == len(self._seen) and all(
            reference() is weight and state == _state(weight)
            for (reference, state), weight in zip(self._seen, weights, strict=True)
        )


def _weights(model: Decoder) -> list[Tensor]:
    """Parameters and codes of quantised layers, but no tables that are computed, and no codes that were released."""
    buffers = [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    return [*model.parameters(), *buffers]


def _state(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version
