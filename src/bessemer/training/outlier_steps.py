"""Steps that are not taken: one whose loss or gradient lies far above those before it would undo what they learned."""

from __future__ import annotations

import math
from typing import Any

import torch

#: Steps that the next one is compared with, and standard deviations above their mean from which it is refused.
WINDOW, SIGMAS = 128, 6.0


class OutlierDetector:
    """Compares each step's loss and gradient norm with those of the last steps.

    A step is refused when either lies more than `sigmas` standard deviations above its mean over the last `window` steps;
    none is before so many were seen. Below the mean nothing is refused: a small gradient does no harm.

    A value over the limit is remembered as the limit itself. So one spike does not widen the limit for those after it, and
    a lasting change, as when another mixture of data begins, is accepted after some steps instead of never.
    """

    def __init__(self, window: int = WINDOW, sigmas: float = SIGMAS) -> None:
        assert window > 1 and sigmas > 0
        self._sigmas = sigmas
        #: The last losses and the last gradient norms, of step n at place n mod window; float64, (2, window).
        self._values = torch.zeros(2, window, dtype=torch.float64)
        self._seen = 0

    def accepts(self, loss: float, gradient_norm: float) -> bool:
        """Whether the step with these may be taken; remembers them. Never, and without a trace, when one is not finite."""
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return False
        values = torch.tensor([loss, gradient_norm], dtype=torch.float64)
        limits = self.limits()
        self._values[:, self._seen % self._values.shape[1]] = torch.minimum(values, limits)
        self._seen += 1
        return bool((values <= limits).all())

    def limits(self) -> torch.Tensor:
        """The largest loss and the largest gradient norm that are accepted now, (2,); infinite while too few were seen."""
        if self._seen < self._values.shape[1]:
            return torch.full((2,), torch.inf, dtype=torch.float64)
        return self._values.mean(1) + self._sigmas * self._values.std(1)

    def state_dict(self) -> dict[str, Any]:
        """What the next decisions depend on: a tensor and a number, for the checkpoint."""
        return {"values": self._values.clone(), "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._values, self._seen = state["values"].clone(), state["seen"]
