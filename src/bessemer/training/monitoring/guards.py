"""Guards of a run: loss spikes are skipped, and the best validation says when to stop.

OLMo-core skips a step at 6 standard deviations above the mean of the last 128. By that rule alone healthy runs lose steps,
because norms have a heavier tail than normal numbers: of a small model's thousand steps one or two lie beyond it, at an
ordinary loss and 1.4 to 1.8 times the usual norm. The gradients before a spike of the loss are larger by factors (OLMo 2,
section 3; Huang et al. 2025, "SPAM"). So a value must also exceed a multiple of the usual one, and both are measured by
medians, which spikes in the window do not move.
"""

from __future__ import annotations

import math
from typing import Any

import torch

#: Steps that the next one is compared with, and deviations above their median from which it is skipped.
WINDOW, SIGMAS = 128, 6.0
#: Multiples of the median that a skipped step's loss or gradient norm also exceeds. At 1.3 times a loss of 2.3 nats the text is
#: twice as surprising; a norm 3 times as large weighs as three steps do in the optimizer's means.
LOSS_FACTOR, NORM_FACTOR = 1.3, 3.0
#: Standard deviation of normal numbers over their median absolute deviation.
_DEVIATIONS_PER_MAD = 1.4826


class OutlierDetector:
    """Compares each step's loss and gradient norm with those of the last steps.

    A step is refused when either exceeds both its median over the last `window` steps by more than `sigmas` deviations, and
    that median times its factor. A deviation is 1.4826 times the median absolute deviation. Nothing is refused before `window`
    steps are known, nor for being small: a small gradient does no harm.

    Refused values enter the window too. One spike does not widen the limit for the steps after it, and a lasting change, as
    when another mixture of data begins, is accepted after at most half a window.
    """

    def __init__(self, window: int = WINDOW, sigmas: float = SIGMAS) -> None:
        assert window > 1 and sigmas > 0
        self._sigmas = sigmas
        #: Ring buffer of the last losses and gradient norms; float64, (2, window).
        self._values = torch.zeros(2, window, dtype=torch.float64)
        self._count = 0

    def accepts(self, loss: float, gradient_norm: float, *, guarded: bool = True) -> bool:
        """Whether a step with this loss and norm may be taken; records both. Values that are not finite are refused unrecorded.

        guarded: whether finite values may be refused; in the phases of a run where they may not they are still recorded.
        """
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return False
        values = torch.tensor([loss, gradient_norm], dtype=torch.float64)
        usual = not guarded or bool((values <= self.limits()).all())
        self._values[:, self._count % self._values.shape[1]] = values
        self._count += 1
        return usual

    def limits(self) -> torch.Tensor:
        """The largest accepted loss and gradient norm, (2,); infinite while the window is not full."""
        if self._count < self._values.shape[1]:
            return torch.full((2,), torch.inf, dtype=torch.float64)
        medians = self._values.quantile(0.5, dim=1)
        deviations = _DEVIATIONS_PER_MAD * (self._values - medians[:, None]).abs().quantile(0.5, dim=1)
        # a multiple of a negative median lies below it; then the deviations alone decide
        factors = torch.tensor([LOSS_FACTOR, NORM_FACTOR], dtype=torch.float64)
        return torch.maximum(medians + self._sigmas * deviations, factors * medians)

    def state_dict(self) -> dict[str, Any]:
        """The window and the number of recorded steps, for the checkpoint."""
        return {"values": self._values.clone(), "seen": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._values = state["values"].clone()
        self._count = state["seen"]


class BestValidation:
    """The lowest validation loss so far, its step, and the validations since."""

    def __init__(self, patience: int | None = None) -> None:
        """patience: validations in a row without a lower loss after which `exhausted` is true; None: never."""
        self._patience = patience
        self.loss = math.inf
        self.step: int | None = None
        self._since = 0

    def add_validation(self, step: int, loss: float) -> bool:
        """Record a validation after `step` steps; whether it is the best."""
        if loss < self.loss:
            self.loss, self.step, self._since = loss, step, 0
            return True
        self._since += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end early."""
        return self._patience is not None and self._since >= self._patience

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "step": -1 if self.step is None else self.step, "since": self._since}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.loss, self._since = values["loss"], values["since"]
        self.step = None if values["step"] < 0 else values["step"]
