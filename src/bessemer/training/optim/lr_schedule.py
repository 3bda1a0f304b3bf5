"""Learning-rate schedules: a factor on the peak as a pure function of the step, never zero inside a run.

Lengths are in steps and need not be integers. Steps are counted from 0; the first step of a warm-up of n steps has the factor
1 / n, the last step of a decay of n steps has 1 / n of it left.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from bessemer.training.config import VALIDATIONS

if TYPE_CHECKING:
    from bessemer.training.config import LoopConfig


def learning_rate_factor(config: LoopConfig, step: int) -> float:
    """The factor in (0, 1] on the peak learning rate at `step` of a run of `config.steps`, under the settings' schedule, and
    where they say so scaled by the root of the batch size while that grows."""
    if config.batch_size_warmup is not None and config.batch_size_warmup.scale_learning_rate:
        return _schedule(config, step) * math.sqrt(config.batch_sizes.of_step(step) / config.batch_size)
    return _schedule(config, step)


def _schedule(config: LoopConfig, step: int) -> float:
    steps, final = config.steps, config.final_learning_rate_fraction
    assert steps is not None
    warmup = config.warmup_length(steps)
    if config.schedule == "wsd":
        decay = config.decay_length(steps)
        return warmup_stable_decay(step, steps, warmup=warmup, decay=decay, shape=config.decay_shape, final=final)
    if config.schedule == "inverse_sqrt":
        return inverse_sqrt(step, warmup=warmup, final=final)
    return (cosine if config.schedule == "cosine" else linear)(step, steps, warmup=warmup, final=final)


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


def validated_steps(config: LoopConfig) -> frozenset[int]:
    """The steps after which a run is validated; the last one always."""
    assert config.steps is not None
    if config.evaluate_every is None:
        return evenly_spaced(config.steps, VALIDATIONS)
    return multiples(config.evaluate_every, config.steps)
