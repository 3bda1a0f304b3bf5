"""Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """Updates each weight by the learning rate times the sign of a mean of gradients; half the state of AdamW.

        c = β₁ m + (1 − β₁) g;    w ← w (1 − ηλ) − η sign(c);    m ← β₂ m + (1 − β₂) g

    An entry of an update is ±1 where AdamW's are about 0.2: learning rates should be 3 to 10 times lower than AdamW's, and
    weight decay as much higher (section 5). The paper's language models use β = (0.95, 0.98), its default is (0.9, 0.99).
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            averages = [self.state[parameter]["exp_avg"] for parameter in parameters]
            beta1, beta2 = group["betas"]
            directions = torch._foreach_lerp(averages, gradients, 1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])
            torch._foreach_lerp_(averages, gradients, 1 - beta2)
