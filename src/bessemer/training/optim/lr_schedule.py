"""Learning-rate schedules: a factor on the peak as a pure function of the step, never zero inside a run.

Lengths are in steps and need not be integers. Steps are counted from 0; the first step of a warm-up of n steps has the factor
1 / n, the last step of a decay of n steps has 1 / n of it left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import model_validator

from bessemer.core.config import Config, setting
from bessemer.training.config_parts import BatchSizes


class ScheduleSettings(Config):
    """The learning rate by step, as a fraction of its peak."""

    schedule: Literal["wsd", "cosine", "linear", "inverse_sqrt"] = setting(
        "wsd",
        "Learning rate after the warm-up. wsd: constant, then a decay at the end (Hu et al. 2024); cosine, linear: decay over "
        "the whole run; inverse_sqrt: one over the root of the step, whatever the end (docs/optimizers.md).",
    )
    warmup_fraction: float | None = setting(
        0.03, "Fraction of the steps in which the learning rate rises from zero.", ge=0, le=1
    )
    warmup_steps: int | None = setting(None, "Warm-up as a number of steps instead of a fraction.", unit="steps", ge=0)
    warmup_tokens: int | None = setting(None, "Warm-up as a number of tokens instead of a fraction.", unit="tokens", ge=0)
    decay_fraction: float | None = setting(
        0.3, "wsd: fraction of the steps, at the end, in which the learning rate falls to zero.", ge=0, le=1
    )
    decay_steps: int | None = setting(None, "Decay as a number of steps instead of a fraction.", unit="steps", ge=0)
    decay_tokens: int | None = setting(None, "Decay as a number of tokens instead of a fraction.", unit="tokens", ge=0)
    decay_shape: Literal["linear", "1-sqrt"] = setting(
        "linear", "wsd: linear decay, or fast at first and slow later (1-sqrt, Hägele et al. 2024)."
    )
    final_learning_rate_fraction: float = setting(
        0.0, "Final learning rate as a fraction of its peak; the minimum of inverse_sqrt.", ge=0, le=1
    )

    @model_validator(mode="before")
    @classmethod
    def _replace_default_lengths(cls, values: Any) -> Any:
        """A length in steps or tokens replaces the default fraction."""
        if not isinstance(values, dict):
            return values
        for phase in ("warmup", "decay"):
            replaced = any(values.get(f"{phase}_{unit}") is not None for unit in ("steps", "tokens"))
            if replaced or (phase == "decay" and values.get("schedule", "wsd") != "wsd"):
                values = {f"{phase}_fraction": None, **values}
        return values

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        for phase in ("warmup", "decay"):
            names = [f"{phase}_{unit}" for unit in ("fraction", "steps", "tokens")]
            given = [name for name in names if getattr(self, name) is not None]
            if phase == "decay" and self.schedule != "wsd":
                if given:
                    raise ValueError(f"{given[0]} is for schedule: wsd, and {self.schedule} has no decay phase: leave it out")
            elif len(given) != 1:
                raise ValueError(f"give exactly one of {', '.join(names)}, not {' and '.join(given) or 'none'}")
        if self.schedule != "wsd" and self.decay_shape != "linear":
            raise ValueError(f"decay_shape: {self.decay_shape} is for schedule: wsd, not for {self.schedule}")
        if (self.warmup_fraction or 0) + (self.decay_fraction or 0) > 1:
            raise ValueError("warmup_fraction and decay_fraction together exceed 1")
        return self


@dataclass(frozen=True)
class LearningRates:
    """Factors in (0, 1] on the peak learning rate by step, counted from 0, of a run of `steps`.

    warmup, decay: lengths in steps; no decay in a schedule without that phase. scaled_sizes: where the rate grows with the root
    of the batch size, the rows of every batch.
    """

    schedule: Literal["wsd", "cosine", "linear", "inverse_sqrt"]
    steps: int
    warmup: float
    decay: float
    shape: Literal["linear", "1-sqrt"] = "linear"
    final: float = 0.0
    scaled_sizes: BatchSizes | None = None

    def factor(self, step: int) -> float:
        """The factor at a step."""
        if self.schedule == "wsd":
            factor = warmup_stable_decay(
                step, self.steps, warmup=self.warmup, decay=self.decay, shape=self.shape, final=self.final
            )
        elif self.schedule == "inverse_sqrt":
            factor = inverse_sqrt(step, warmup=self.warmup, final=self.final)
        else:
            schedule = cosine if self.schedule == "cosine" else linear
            factor = schedule(step, self.steps, warmup=self.warmup, final=self.final)
        sizes = self.scaled_sizes
        return factor if sizes is None else factor * math.sqrt(sizes.of_step(step) / sizes.final)

    def in_constant_phase(self, step: int) -> bool:
        """Whether a step lies between the warm-up and wsd's decay."""
        return self.warmup <= step < self.steps - self.decay


def warmup_stable_decay(
    step: int, steps: int, *, warmup: float, decay: float, shape: Literal["linear", "1-sqrt"] = "linear", final: float = 0.0
) -> float:
    """Rises over the first `warmup` steps, stays at 1, and falls to `final` over the last `decay` (Hu et al. 2024, MiniCPM,
    section 4).

    1-sqrt: 1 − √x after a fraction x of the decay (Hägele et al. 2024, section 3.3).
    """
    left = min(1.0, _left(step, steps, decay))
    return min(_rise(step, warmup), _above(final, left if shape == "linear" else 1 - math.sqrt(1 - left)))


def cosine(step: int, steps: int, *, warmup: float, final: float = 0.0) -> float:
    """Half a cosine wave from the end of the warm-up to the end of the run (Loshchilov and Hutter 2017, eq. 5, no restarts)."""
    left = min(1.0, _left(step, steps, steps - warmup))
    return min(_rise(step, warmup), _above(final, math.sin(math.pi / 2 * left) ** 2))


def linear(step: int, steps: int, *, warmup: float, final: float = 0.0) -> float:
    """Linear from the end of the warm-up to the end of the run (Devlin et al. 2019, appendix A.2)."""
    return warmup_stable_decay(step, steps, warmup=warmup, decay=steps - warmup, final=final)


def inverse_sqrt(step: int, *, warmup: float, final: float = 0.0) -> float:
    """√(warmup / step), which needs no end; `final` is its minimum (Vaswani et al. 2017, section 5.3, with a peak of 1)."""
    return min(_rise(step, warmup), max(final, math.sqrt(max(1.0, warmup) / (step + 1))))


def _rise(step: int, warmup: float) -> float:
    return min(1.0, (step + 1) / max(1.0, warmup))


def _left(step: int, steps: int, decay: float) -> float:
    """The fraction of the decay that is left; above 1 before it begins."""
    assert 0 <= step < steps, f"step {step} of {steps}"
    return (steps - step) / max(1.0, decay)


def _above(final: float, left: float) -> float:
    return final + (1 - final) * left


def evenly_spaced(steps: int, points: int) -> frozenset[int]:
    """`points` numbers of finished steps spread evenly over a run, its end included; fewer when the run is shorter."""
    return frozenset(max(1, round(steps * point / points)) for point in range(1, points + 1))


def multiples(interval: int, steps: int) -> frozenset[int]:
    """The numbers of finished steps that `interval` divides, and the end of the run."""
    return frozenset([*range(interval, steps, interval), steps])


def log_spaced(steps: int, points: int) -> frozenset[int]:
    """`points` numbers of finished steps, each four times the one before, the last at the end: a model changes fast at
    first and slowly later. Fewer in a short run."""
    return frozenset(max(1, steps // 4**point) for point in range(points))
