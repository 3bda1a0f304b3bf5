"""The law where data are repeated: D tokens of which only U are different (Muennighoff et al. 2023, 2305.16264)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bessemer.scaling.laws.points import Vector


@dataclass(frozen=True)
class DataConstrainedLaw:
    """L = E + A/N'^α + B/D'^β, in which N' and D' are what N parameters and D tokens are worth on U_D unique tokens.

    The first R* repetitions are worth nearly as much as new tokens, later ones ever less; parameters beyond the U_N that are
    optimal for U_D decay likewise. The defaults are the paper's fit (its appendix A) on C4, in nats a token.
    """

    E: float = 1.87
    A: float = 521.0
    B: float = 1488.0
    alpha: float = 0.353
    beta: float = 0.353
    #: R*: repetitions after which a further one is worth 1/e of a new one, of tokens and of excess parameters.
    repeated_tokens: float = 15.4
    repeated_parameters: float = 5.3
    #: U_N over U_D.
    optimal_parameters_per_token: float = 0.051

    def predict(self, parameters: Vector | float, tokens: Vector | float, unique_tokens: Vector | float) -> Vector:
        """L of N parameters on D tokens, `unique_tokens` of them different. Raises ValueError when those are more than D."""
        n, d, unique_d = (np.asarray(value, dtype=float) for value in (parameters, tokens, unique_tokens))
        if np.any(unique_d > d):
            raise ValueError("more unique tokens than tokens")
        unique_n = np.minimum(self.optimal_parameters_per_token * unique_d, n)
        worth_n = _worth(n, unique_n, self.repeated_parameters)
        worth_d = _worth(d, unique_d, self.repeated_tokens)
        return np.asarray(self.E + self.A * worth_n**-self.alpha + self.B * worth_d**-self.beta)


def _worth(total: Vector, unique: Vector, decay: float) -> Vector:
    """U + U R* (1 − e^(−R / R*)) for R = total / U − 1 repetitions: what `total` is worth when only `unique` is new (eq. 5)."""
    repetitions = np.maximum(total / unique - 1, 0)
    return np.asarray(unique + unique * decay * (1 - np.exp(-repetitions / decay)))
