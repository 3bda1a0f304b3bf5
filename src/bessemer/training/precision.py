"""Mixed precision: the loss scale of float16, and float8 matmuls on GPUs that support them. Weights stay float32."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bessemer.core.errors import ConfigError
from bessemer.model.decoder import Decoder

#: Initial loss scale, factor of its changes, and finite steps in a row after which it grows.
_FIRST, _FACTOR, _PATIENCE = 2.0**16, 2.0, 1000


class LossScale:
    """Dynamic loss scaling, which keeps small gradients inside float16's range (Micikevicius et al. 2018, section 3.2).

    The loss is multiplied before the backward pass and the gradients divided after it. A step that overflows is skipped and
    halves the scale; many finite steps in a row double it.
    """

    def __init__(self) -> None:
        self._scale = _FIRST
        self._good = 0

    @property
    def value(self) -> float:
        """The present factor."""
        return self._scale

    def update(self, finite: bool) -> None:
        """Adapt the scale to whether a step's gradients were finite."""
        if not finite:
            self._scale = self._scale / _FACTOR
            self._good = 0
            return
        self._good += 1
        if self._good == _PATIENCE:
            self._scale = self._scale * _FACTOR
            self._good = 0

    @property
    def exhausted(self) -> bool:
        """Whether gradients are not finite at any scale, so that float16's range is not the cause."""
        return self._scale < 1.0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"scale": self._scale, "good": self._good}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._scale = values["scale"]
        self._good = values["good"]


class Unscaled:
    """The scale of every other dtype: always 1."""

    value = 1.0
    exhausted = True

    def update(self, finite: bool) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, values: dict[str, Any]) -> None: ...


def use_float8(model: Decoder) -> None:
    """Compute the matmuls of the blocks in float8 with a scale per tensor, through torchao (Micikevicius et al. 2022).

    Raises ConfigError where torchao is not installed. Needs a GPU with float8 (compute capability 8.9 or more).
    """
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        raise ConfigError("float8: true needs the package torchao: pip install torchao") from None

    def inside_blocks(module: nn.Module, name: str) -> bool:
        # float8 matmuls need widths that are multiples of 16
        weight: Tensor | None = getattr(module, "weight", None)
        return name.startswith("layers.") and weight is not None and all(size % 16 == 0 for size in weight.shape)

    convert_to_float8_training(model, module_filter_fn=inside_blocks)
