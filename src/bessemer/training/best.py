"""The best validation of a run: which step had it, and whether the run has stopped getting better."""

from __future__ import annotations

import math
from typing import Any


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
        """For the checkpoint."""
        return {"loss": self.loss, "step": -1 if self.step is None else self.step, "since": self._since}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.loss, self._since = values["loss"], values["since"]
        self.step = None if values["step"] < 0 else values["step"]
