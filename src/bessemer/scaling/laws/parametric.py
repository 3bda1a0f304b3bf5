"""L = E + A/N^α + B/D^β (Hoffmann et al. 2022, eq. 2), and what follows from it."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from bessemer.scaling.laws.points import FLOPS_PER_PARAMETER_TOKEN, Vector


@dataclass(frozen=True)
class ParametricLaw:
    """The five numbers of the law.

    E is the loss that no model of the kind goes below, A/N^α the price of a finite model, B/D^β that of finite data. L has the
    unit of the points that it was fitted to, and N is counted as theirs.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def predict(self, parameters: Vector | float, tokens: Vector | float) -> Vector:
        """L at N and D."""
        n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return np.asarray(self.E + self.A * n**-self.alpha + self.B * d**-self.beta)

    @property
    def parameters_exponent(self) -> float:
        """a of N ∝ C^a along the compute-optimal models: β / (α + β)."""
        return self.beta / (self.alpha + self.beta)

    def optimal(self, flops: float) -> tuple[float, float]:
        """(N, D) of the lowest loss at C = 6 N D (Hoffmann et al. 2022, eq. 4)."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * (flops / FLOPS_PER_PARAMETER_TOKEN) ** self.parameters_exponent
        return parameters, flops / FLOPS_PER_PARAMETER_TOKEN / parameters

    def numbers(self) -> tuple[float, float, float, float, float]:
        """(E, A, B, α, β)."""
        return astuple(self)


#: Hoffmann et al. 2022, approach 3, as printed: rounded, from an optimizer that stopped early, and so not to be relied on.
HOFFMANN = ParametricLaw(1.69, 406.4, 410.7, 0.34, 0.28)
#: Besiroglu et al. 2024 (2404.10102), the same form on 240 of the points of Hoffmann et al.'s figure 4. All parameters counted;
#: nats a token of MassiveText with Chinchilla's tokenizer.
BESIROGLU = ParametricLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
