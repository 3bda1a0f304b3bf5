"""Skipping of loss spikes: a step whose loss or gradient norm lies far above those before it is not taken."""

from __future__ import annotations

import math
from typing import Any

import torch

#: Steps that the next one is compared with, and standard deviations above their mean from which it is skipped.
WINDOW, SIGMAS = 128, 6.0


class OutlierDetector:
    """Compares each step's loss and gradient norm with those of the last steps.

    A step is refused when either lies more than `sigmas` standard deviations above its mean over the last `window` steps, and
    never before `window` steps are known. Values below the mean are accepted: a small gradient does no harm.

    A value over the limit enters the window as the limit itself. So one spike does not widen the limit for the steps after it,
    and a lasting change, as when another mixture of data begins, is accepted after some steps instead of never.
    """

    def __init__(self, window: int = WINDOW, sigmas: float = SIGMAS) -> None:
        assert window > 1 and sigmas > 0
        self._sigmas = sigmas
        #: Ring buffer of the last losses and gradient norms; float64, (2, window).
        self._values = torch.zeros(2, window, dtype=torch.float64)
        self._count = 0

    def accepts(self, loss: float, gradient_norm: float) -> bool:
        """Whether a step with this loss and norm may be taken; records both. Values that are not finite are refused
        unrecorded."""
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return False
        values = torch.tensor([loss, gradient_norm], dtype=torch.float64)
        limits = self.limits()
        self._values[:, self._count % self._values.shape[1]] = torch.minimum(values, limits)
        self._count += 1
        return bool((values <= limits).all())

    def limits(self) -> torch.Tensor:
        """The largest accepted loss and gradient norm, (2,); infinite while the window is not full."""
        if self._count < self._values.shape[1]:
            return torch.full((2,), torch.inf, dtype=torch.float64)
        return self._values.mean(1) + self._sigmas * self._values.std(1)

    def state_dict(self) -> dict[str, Any]:
        """The window and the number of recorded steps, for the checkpoint."""
        return {"values": self._values.clone(), "seen": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._values = state["values"].clone()
        self._count = state["seen"]
