"""Online preference optimisation: the best and the worst completion of a prompt are a pair (Guo et al. 2024, arXiv 2402.04792).

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from bessemer.posttraining.preference.losses import PairLossSettings
from bessemer.posttraining.preference.objective import REFERENCE_LOG_PROBS, PreferenceObjective
from bessemer.posttraining.preference.packing import PairExample, pack_examples
from bessemer.posttraining.preference.registry import PAIR_LOSSES
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.rollout_batches import RolloutBatches
from bessemer.posttraining.rl.sampler import Group
from bessemer.posttraining.rl.sharing import of_all_rows
from bessemer.training.data.batches import Batch
from bessemer.training.trainee import REFERENCE, Trainee


class _Best(NamedTuple):
    """Places in a group of the completions of the highest and the lowest reward, the first of equals; whether they differ."""

    best: int
    worst: int
    differs: bool


def pair_objective(config: RLConfig) -> PreferenceObjective:
    """The objective of the settings' loss of pairs. Raises ConfigError for a name that is none."""
    return PreferenceObjective(PAIR_LOSSES.find(str(config.pair_loss)).load(), PairLossSettings(beta=config.beta))


class PairBatches:
    """Mini-batches of a pair for each prompt. A pair of equal rewards, or of a prompt with fewer than two, weighs nothing."""

    def __init__(self, config: RLConfig, padding_id: int) -> None:
        self._config = config
        self._padding_id = padding_id
        self._needs_reference = PAIR_LOSSES.find(str(config.pair_loss)).load().needs_reference

    def __call__(self, groups: Sequence[Group], trainee: Trainee, more: Sequence[Sequence[int]] = ()) -> RolloutBatches:
        """As of `BatchMaker`; the reference is asked of the pairs of each epoch. Advantages are 1 of the best completion of a
        pair, −1 of the worst, 0 of others."""
        size = self._config.batch_size // self._config.group_size
        chosen = [_best_and_worst(group) for group in groups]
        batches = [
            self._batch([groups[place] for place in some], [chosen[place] for place in some], trainee)
            for order in (range(len(groups)), *more)
            for some in (order[start : start + size] for start in range(0, len(groups), size))
        ]
        advantages_R = torch.zeros(len(groups) * self._config.group_size, dtype=torch.float64)
        for number, (best, worst, differs) in enumerate(chosen):
            start = number * self._config.group_size
            advantages_R[start + best] += float(differs)
            advantages_R[start + worst] -= float(differs)
        figures = {"pairs": float(sum(one.differs for one in chosen))}
        return RolloutBatches(batches, advantages_R, torch.zeros_like(advantages_R), figures)

    def _batch(self, groups: Sequence[Group], chosen: Sequence[_Best], trainee: Trainee) -> Batch:
        pairs = [
            PairExample(group.samples[one.best].example(), group.samples[one.worst].example(), weight=float(one.differs))
            for group, one in zip(groups, chosen, strict=True)
        ]
        layout = trainee.mesh.layout
        longest = max(pair.tokens for pair in pairs)
        batch = pack_examples(
            pairs,
            layout.row_length(longest),
            self._padding_id,
            row_count=layout.row_count,
            shares_prompts=trainee.shares_prefixes,
        )
        if not self._needs_reference:
            return batch
        with torch.no_grad():
            log_probs_BT = of_all_rows(trainee, batch, lambda rows: trainee.log_probs(rows, REFERENCE))
        return batch.with_values(per_token={REFERENCE_LOG_PROBS: log_probs_BT})


def _best_and_worst(group: Group) -> _Best:
    totals_G = group.totals_G
    if int((~totals_G.isnan()).sum()) < 2:
        return _Best(0, 0, False)
    best, worst = int(totals_G.nan_to_num(nan=-torch.inf).argmax()), int(totals_G.nan_to_num(nan=torch.inf).argmin())
    return _Best(best, worst, bool(totals_G[best] > totals_G[worst]))
