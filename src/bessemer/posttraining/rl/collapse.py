"""Limits beyond which a policy has collapsed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from torch import Tensor

from bessemer.core.errors import BessemerError
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.samples import Sample


class CollapseError(BessemerError):
    """The policy has collapsed: its entropy, or its distance from the reference, is beyond the limit."""


def check_collapse(config: RLConfig, step: int, samples: Sequence[Sample], totals_R: Tensor, kl_R: Tensor) -> None:
    """Raise CollapseError when the entropy of the sampled tokens, or their divergence from the reference, is beyond a limit.

    totals_R: what samples are worth, NaN of those left out, whose divergence is not measured. kl_R: of each sample,
    Σ log π − log π_ref.
    """
    log_probs = [value for sample in samples for value in sample.log_probs]
    measured = sum(len(one.log_probs) for one, is_out in zip(samples, totals_R.isnan().tolist(), strict=True) if not is_out)
    entropy, kl = -statistics.fmean(log_probs), float(kl_R.sum()) / max(measured, 1)
    limits = {
        f"a token's entropy is {entropy:.4f} nats, below min_entropy {config.min_entropy}": config.min_entropy is not None
        and entropy < config.min_entropy,
        f"a token's entropy is {entropy:.4f} nats, above max_entropy {config.max_entropy}": config.max_entropy is not None
        and entropy > config.max_entropy,
        f"a token's KL divergence is {kl:.4f} nats, above max_kl {config.max_kl}": config.max_kl is not None
        and kl > config.max_kl,
    }
    for reason, is_beyond in limits.items():
        if is_beyond:
            raise CollapseError(
                f"step {step + 1:,}: the policy has collapsed: {reason}. Its checkpoints are kept; lower "
                "learning_rate, or raise beta or entropy_weight"
            )
