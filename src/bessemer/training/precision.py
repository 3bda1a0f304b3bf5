"""Number formats of a step: float16's loss scale, and float8 products on cards that have them. Weights stay float32."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bessemer.core.errors import ConfigError
from bessemer.model.decoder import Decoder

#: The scale that training starts with, by how much it changes, after how many good steps it grows.
_FIRST, _FACTOR, _PATIENCE = 2.0**16, 2.0, 1000


class LossScale:
    """Keeps small gradients inside float16's range (Micikevicius et al. 2018, section 3.2).

    The loss is multiplied before the backward pass and the gradients divided after it. A step that overflows is not taken
    and halves the scale; many good steps in a row double it.
    """

    def __init__(self) -> None:
        self._scale, self._good = _FIRST, 0

    @property
    def value(self) -> float:
        """The present factor."""
        return self._scale

    def update(self, finite: bool) -> None:
        """Learn whether a step's gradients were finite."""
        if not finite:
            self._scale, self._good = self._scale / _FACTOR, 0
            return
        self._good += 1
        if self._good == _PATIENCE:
            self._scale, self._good = self._scale * _FACTOR, 0

    @property
    def exhausted(self) -> bool:
        """Whether gradients are not finite at any scale: then the trouble is not float16's range."""
        return self._scale < 1.0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"scale": self._scale, "good": self._good}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._scale, self._good = values["scale"], values["good"]


class Unscaled:
    """The scale of every other type: 1, always."""

    value = 1.0
    exhausted = True

    def update(self, finite: bool) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, values: dict[str, Any]) -> None: ...


def use_float8(model: Decoder) -> None:
    """Make the products of the blocks in float8, scaled tensor by tensor, through torchao (Micikevicius et al. 2022).

    Raises ConfigError where torchao is not installed. Needs a card with float8 (compute capability 8.9 or more).
    """
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        raise ConfigError("float8: true needs the package torchao: pip install torchao") from None

    def inside_blocks(module: nn.Module, name: str) -> bool:
        # widths that are no multiple of 16 have no float8 product
        weight: Tensor | None = getattr(module, "weight", None)
        return name.startswith("layers.") and weight is not None and all(size % 16 == 0 for size in weight.shape)

    convert_to_float8_training(model, module_filter_fn=inside_blocks)
