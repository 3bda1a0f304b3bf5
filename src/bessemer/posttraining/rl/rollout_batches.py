"""From a rollout to the batches that a policy is trained on: log-probabilities, advantages, and what an aggregation counts.

Shapes: R samples of a rollout, P prompts, G samples of a prompt, K rewards, B rows, T tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from bessemer.posttraining.rl.advantages import decoupled
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.critic import with_values
from bessemer.posttraining.rl.objective import OLD, REFERENCE_LOG_PROBS, SAMPLER
from bessemer.posttraining.rl.registries import ADVANTAGES
from bessemer.posttraining.rl.sampler import Group
from bessemer.posttraining.rl.samples import Packed, pack_samples
from bessemer.posttraining.rl.sharing import of_all_rows
from bessemer.training.data.batches import IGNORE_INDEX, Batch
from bessemer.training.objectives import POLICY
from bessemer.training.trainee import REFERENCE, Trainee


@dataclass(frozen=True)
class RolloutBatches:
    """The mini-batches of a rollout.

    advantages_R: of each sample, for a reader. divergence_R: Σ log π − log π_ref of each; zeros without a reference. figures:
    for the metrics.
    """

    batches: Sequence[Batch]
    advantages_R: Tensor
    divergence_R: Tensor
    figures: Mapping[str, float] = field(default_factory=dict)


class BatchMaker(Protocol):
    """Makes the mini-batches of a rollout's groups, each of as many groups, in order."""

    def __call__(self, groups: Sequence[Group], trainee: Trainee) -> RolloutBatches:
        """trainee: the policy, whose weights sampled the groups, a reference and a critic."""


class AdvantageBatches:
    """Mini-batches of `batch_size` completions with their advantages; those without a reward have no targets."""

    def __init__(self, config: RLConfig, weights: Sequence[float], padding_id: int) -> None:
        """weights: of the rewards. Raises ConfigError for an advantage that there is not."""
        self._config = config
        self._weights_K = torch.tensor(weights)
        self._padding_id = padding_id
        self._advantage = ADVANTAGES.find(config.advantage).load()

    def __call__(self, groups: Sequence[Group], trainee: Trainee) -> RolloutBatches:
        """As of `BatchMaker`."""
        totals_R = torch.cat([group.totals_G for group in groups])
        packed = [self._with_log_probs(one, trainee) for one in self._packed(groups, totals_R, trainee)]
        ratios = [_log_ratios(one.batch) for one in packed]
        divergence_R = torch.cat(
            [one.of_samples(one.batch.sequence_sums(ratios_BT)) for one, ratios_BT in zip(packed, ratios, strict=True)]
        ).double()
        beta = self._config.beta if self._config.kl == "reward" else 0.0
        figures: Mapping[str, float] = {}
        if self._config.critic is not None:
            penalties = [beta * ratios_BT for ratios_BT in ratios]
            valued = with_values(packed, totals_R, penalties, trainee, self._config.critic)
            packed, advantages_R, figures = list(valued.packed), valued.advantages_R, valued.figures
        else:
            advantages_R = self._advantages(groups, totals_R, beta * divergence_R)
            parts = advantages_R.float().split([one.samples for one in packed])
            packed = [one.with_advantages(part_R) for one, part_R in zip(packed, parts, strict=True)]
        totals = totals_R.split([one.samples for one in packed])
        batches = [self._counted(one, part_R) for one, part_R in zip(packed, totals, strict=True)]
        return RolloutBatches(batches, advantages_R, divergence_R, figures)

    def _packed(self, groups: Sequence[Group], totals_R: Tensor, trainee: Trainee) -> list[Packed]:
        samples = [sample for group in groups for sample in group.samples]
        size, kept = self._config.batch_size, (~totals_R.isnan()).tolist()
        layout = trainee.mesh.layout
        row = self._config.context_length if trainee.shares_prefixes else None
        places = [slice(start, start + size) for start in range(0, len(samples), size)]
        return [pack_samples(samples[place], kept[place], self._padding_id, layout, shared_row=row) for place in places]

    def _with_log_probs(self, packed: Packed, trainee: Trainee) -> Packed:
        """With the log-probabilities that do not change while the rollout is trained on: of the policy as old, where more than
        one update follows; of the reference."""
        config, batch = self._config, packed.batch
        values: dict[str, Tensor] = {}
        with torch.no_grad():
            if config.updates > 1:
                values[OLD] = self._log_probs(batch, trainee, POLICY)
            if config.beta:
                values[REFERENCE_LOG_PROBS] = self._log_probs(batch, trainee, REFERENCE)
        return replace(packed, batch=batch.with_values(per_token=values))

    def _log_probs(self, batch: Batch, trainee: Trainee, role: str) -> Tensor:
        temperature = self._config.temperature
        return of_all_rows(trainee, batch, lambda rows: trainee.log_probs(rows, role, temperature=temperature))

    def _advantages(self, groups: Sequence[Group], totals_R: Tensor, penalties_R: Tensor) -> Tensor:
        config = self._config
        if config.reward_scale != "decoupled":
            return self._advantage(totals_R - penalties_R, config.group_size)
        rewards_RK = torch.cat([group.rewards_GK for group in groups])
        if config.truncated == "zero":
            is_cut_R = torch.tensor([sample.is_cut for group in groups for sample in group.samples])
            rewards_RK = rewards_RK.masked_fill(is_cut_R[:, None] & ~rewards_RK.isnan(), 0.0)
        return decoupled(rewards_RK, self._weights_K, config.group_size, penalties_R)

    def _counted(self, packed: Packed, totals_R: Tensor) -> Batch:
        """A mini-batch with what its objective reads of sequences."""
        group = self._config.group_size
        tokens_PG = packed.target_counts.view(-1, group)
        per_sample = {
            "reward": totals_R.nan_to_num(nan=0.0),
            "group": torch.arange(packed.samples) // group,
            "group_tokens": tokens_PG.sum(1, keepdim=True).expand_as(tokens_PG).flatten(),
            "group_answers": (tokens_PG > 0).sum(1, keepdim=True).expand_as(tokens_PG).flatten().float(),
        }
        per_sequence = {name: packed.of_sequences(values.float()) for name, values in per_sample.items()}
        return packed.batch.with_values(per_sequence=per_sequence)


def _log_ratios(batch: Batch) -> Tensor:
    """log π − log π_ref of each target, (B, T); zeros without a reference."""
    values = batch.per_token
    if REFERENCE_LOG_PROBS not in values:
        return torch.zeros(batch.tokens_BT.shape)
    own_BT = values.get(OLD, values[SAMPLER])
    return (own_BT - values[REFERENCE_LOG_PROBS]) * (batch.targets_BT != IGNORE_INDEX)
