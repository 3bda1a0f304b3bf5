"""Warm-up–stable–decay: the learning rate as a pure function of the step (Hu et al. 2024, MiniCPM, section 4)."""

from __future__ import annotations


def warmup_stable_decay(step: int, steps: int, *, warmup_fraction: float, decay_fraction: float) -> float:
    """The factor in (0, 1] on the peak learning rate at `step`, counted from 0, of a run of `steps`.

    Rises linearly over the first `warmup_fraction` of the run, stays at 1, and falls linearly towards zero over the
    last `decay_fraction`. It is never zero inside a run: a step that changes nothing is a step wasted.
    """
    assert 0 <= step < steps, f"step {step} of {steps}"
    rise = (step + 1) / max(1.0, warmup_fraction * steps)
    fall = (steps - step) / max(1.0, decay_fraction * steps)
    return min(1.0, rise, fall)


def evenly_spaced(steps: int, points: int) -> frozenset[int]:
    """`points` numbers of finished steps spread evenly over a run, its end included; fewer when the run is shorter."""
    return frozenset(max(1, round(steps * point / points)) for point in range(1, points + 1))


def ever_rarer(steps: int, points: int) -> frozenset[int]:
    """`points` numbers of finished steps, each four times the one before, the last at the end: a model changes fast at
    first and slowly later. Fewer when the run is shorter."""
    return frozenset(max(1, steps // 4**point) for point in range(points))
