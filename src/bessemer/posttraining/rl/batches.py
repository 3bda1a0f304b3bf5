"""Batches from a rollout: log-probabilities, advantages, and the denominators of the aggregation; or, for online preference
optimisation, pairs of the best and the worst completion of a prompt (Guo et al. 2024, arXiv 2402.04792).

Shapes: R samples of a rollout, P prompts, G samples of a prompt, K rewards, B rows, T tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bessemer.posttraining.data.packing import PairExample, pack_pair_examples, placed
from bessemer.posttraining.data.picture_encoding import PictureEncoder
from bessemer.posttraining.preference.config import PAIR_LOSSES
from bessemer.posttraining.preference.losses import PairLossSettings
from bessemer.posttraining.preference.objective import REFERENCE_LOG_PROBS, PreferenceObjective
from bessemer.posttraining.rl.advantages import RewardToGo, decoupled, rewards_to_go, whitened_tokens
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.critic import with_values
from bessemer.posttraining.rl.methods import ADVANTAGES as ADVANTAGE_PLUGINS
from bessemer.posttraining.rl.objective import OLD, TOKEN_REFERENCE_LOG_PROBS
from bessemer.posttraining.rl.policy_sampler import JudgedGroup
from bessemer.posttraining.sampling.samples import ADVANTAGES, SAMPLER, Packed, Sample, of_all_rows, pack_samples
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.model_roles import POLICY, REFERENCE, ModelRoles


@dataclass(frozen=True)
class RolloutBatches:
    """The mini-batches of a rollout, those of one epoch after those of the other.

    advantages_R: of each sample, for a reader. divergence_R: Σ log π − log π_ref of each; zeros without a reference. figures:
    for the metrics.
    """

    batches: Sequence[Batch]
    advantages_R: Tensor
    divergence_R: Tensor
    figures: Mapping[str, float] = field(default_factory=dict)


class BatchMaker(Protocol):
    """Makes the mini-batches of a rollout's groups, each of as many groups: one epoch of them in order, then those of more."""

    def __call__(self, groups: Sequence[JudgedGroup], models: ModelRoles, more: Sequence[Sequence[int]] = ()) -> RolloutBatches:
        """models: the policy, whose weights sampled the groups, a reference and a critic. more: the order of the groups in
        each further epoch."""


class AdvantageBatches:
    """Mini-batches of `batch_size` completions with their advantages; those without a reward have no targets."""

    def __init__(
        self, config: RLConfig, weights: Sequence[float], padding_id: int, pictures: PictureEncoder | None = None
    ) -> None:
        """weights: of the rewards. pictures: of prompts that have some. Raises ConfigError for an unknown advantage."""
        self._config = config
        self._pictures = pictures
        self._weights_K = torch.tensor(weights)
        self._padding_id = padding_id
        self._advantage = ADVANTAGE_PLUGINS.find(config.advantage).load()

    def __call__(self, groups: Sequence[JudgedGroup], models: ModelRoles, more: Sequence[Sequence[int]] = ()) -> RolloutBatches:
        """Log-probabilities and advantages belong to the rollout and are the same in every epoch."""
        samples = [sample for group in groups for sample in group.samples]
        totals_R = torch.cat([group.totals_G for group in groups])
        packed = [self._with_log_probs(one, models) for one in self._packed(samples, totals_R, models)]
        ratios = [_log_ratios(one.batch) for one in packed]
        divergence_R = torch.cat(
            [one.of_samples(one.batch.sequence_sums(ratios_BT)) for one, ratios_BT in zip(packed, ratios, strict=True)]
        ).double()
        beta = self._config.beta if self._config.kl == "reward" else 0.0
        figures: Mapping[str, float] = {}
        penalties = [beta * ratios_BT for ratios_BT in ratios]
        if self._config.critic is not None:
            valued = with_values(packed, totals_R, penalties, models, self._config.critic)
            packed, advantages_R, figures = list(valued.packed), valued.advantages_R, valued.figures
        elif isinstance(self._advantage, RewardToGo) and self._config.reward_scale != "decoupled":
            outcomes_R = self._advantage.outcomes(totals_R, self._config.group_size)
            packed = with_rewards_to_go(packed, outcomes_R, penalties, self._config.discount)
            advantages_R = torch.cat([one.means(one.batch.per_token[ADVANTAGES]) for one in packed])
        else:
            advantages_R = self._advantages(groups, totals_R, beta * divergence_R)
            parts = advantages_R.float().split([one.samples for one in packed])
            packed = [one.with_advantages(part_R) for one, part_R in zip(packed, parts, strict=True)]
        batches = self._counted(packed, totals_R)
        group = self._config.group_size
        for order in more:
            places = [group * number + place for number in order for place in range(group)]
            batches += self._counted(self._repacked(places, packed, samples, totals_R, models), totals_R[places])
        return RolloutBatches(batches, advantages_R, divergence_R, figures)

    def _repacked(
        self, places: Sequence[int], packed: Sequence[Packed], samples: Sequence[Sample], totals_R: Tensor, models: ModelRoles
    ) -> list[Packed]:
        """The samples in another order, in mini-batches with the values that their tokens have in `packed`."""
        size = self._config.batch_size
        values = [
            of_sample
            for start, one in zip(range(0, len(samples), size), packed, strict=True)
            for of_sample in one.target_values(samples[start : start + size])
        ]
        ordered = [samples[place] for place in places]
        return [
            one.with_target_values(ordered[start : start + size], [values[place] for place in places[start : start + size]])
            for start, one in zip(range(0, len(samples), size), self._packed(ordered, totals_R[places], models), strict=True)
        ]

    def _packed(self, samples: Sequence[Sample], totals_R: Tensor, models: ModelRoles) -> list[Packed]:
        size, kept = self._config.batch_size, (~totals_R.isnan()).tolist()
        layout = models.mesh.layout
        row = self._config.context_length if models.shares_prefixes else None
        places = [slice(start, start + size) for start in range(0, len(samples), size)]
        packed = [pack_samples(samples[place], kept[place], self._padding_id, layout, shared_row=row) for place in places]
        return [replace(one, batch=placed(one.batch, self._pictures)) for one in packed]

    def _with_log_probs(self, packed: Packed, models: ModelRoles) -> Packed:
        """With the log-probabilities that do not change while the rollout is trained on: of the policy as old, where more than
        one update follows; of the reference."""
        config, batch = self._config, packed.batch
        values: dict[str, Tensor] = {}
        with torch.no_grad():
            if config.updates > 1:
                values[OLD] = self._log_probs(batch, models, POLICY)
            if config.beta:
                values[TOKEN_REFERENCE_LOG_PROBS] = self._log_probs(batch, models, REFERENCE)
        return replace(packed, batch=batch.with_values(per_token=values))

    def _log_probs(self, batch: Batch, models: ModelRoles, role: str) -> Tensor:
        temperature = self._config.temperature
        return of_all_rows(models, batch, lambda rows: models.log_probs(rows, role, temperature=temperature))

    def _advantages(self, groups: Sequence[JudgedGroup], totals_R: Tensor, penalties_R: Tensor) -> Tensor:
        """The advantage of each answer, from its reward less the penalty for its divergence."""
        config = self._config
        if config.reward_scale != "decoupled":
            assert not isinstance(self._advantage, RewardToGo)
            return self._advantage(totals_R - penalties_R, config.group_size)
        rewards_RK = torch.cat([group.rewards_GK for group in groups])
        if config.truncated == "zero":
            is_cut_R = torch.tensor([sample.is_cut for group in groups for sample in group.samples])
            rewards_RK = rewards_RK.masked_fill(is_cut_R[:, None] & ~rewards_RK.isnan(), 0.0)
        return decoupled(rewards_RK, self._weights_K, config.group_size, penalties_R)

    def _counted(self, packed: Sequence[Packed], totals_R: Tensor) -> list[Batch]:
        """Mini-batches with what their objective reads of sequences."""
        parts = totals_R.split([one.samples for one in packed])
        return [self._with_counts(one, part_R) for one, part_R in zip(packed, parts, strict=True)]

    def _with_counts(self, packed: Packed, totals_R: Tensor) -> Batch:
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


def with_rewards_to_go(
    packed: Sequence[Packed], outcomes_R: Tensor, penalties: Sequence[Tensor], discount: float
) -> list[Packed]:
    """Mini-batches with the advantages of REINFORCE++ (Hu et al. 2025, eq. 6 to 9): each token's rewards to go, whitened over
    the tokens of the rollout.

    outcomes_R: of the samples of all mini-batches, given at their last tokens; NaN where there is none. penalties: of each
    mini-batch, what is taken off the rewards of single tokens, (B, T).
    """
    masks = [one.batch.targets_BT != IGNORE_INDEX for one in packed]
    parts = outcomes_R.nan_to_num(nan=0.0).split([one.samples for one in packed])
    returns = [
        rewards_to_go(one.at_ends(part_R) - penalty_BT, mask_BT, document_ids_BT=one.batch.document_ids_BT, discount=discount)
        for one, part_R, penalty_BT, mask_BT in zip(packed, parts, penalties, masks, strict=True)
    ]
    white = whitened_tokens(returns, masks)
    return [one.with_values({ADVANTAGES: white_BT.float()}) for one, white_BT in zip(packed, white, strict=True)]


def _log_ratios(batch: Batch) -> Tensor:
    """log π − log π_ref of each target, (B, T); zeros without a reference."""
    values = batch.per_token
    if TOKEN_REFERENCE_LOG_PROBS not in values:
        return torch.zeros(batch.tokens_BT.shape)
    own_BT = values.get(OLD, values[SAMPLER])
    return (own_BT - values[TOKEN_REFERENCE_LOG_PROBS]) * (batch.targets_BT != IGNORE_INDEX)


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

    def __init__(self, config: RLConfig, padding_id: int, pictures: PictureEncoder | None = None) -> None:
        """pictures: of prompts that have some."""
        self._config = config
        self._pictures = pictures
        self._padding_id = padding_id
        self._needs_reference = PAIR_LOSSES.find(str(config.pair_loss)).load().needs_reference

    def __call__(self, groups: Sequence[JudgedGroup], models: ModelRoles, more: Sequence[Sequence[int]] = ()) -> RolloutBatches:
        """Reference log-probabilities are computed for the pairs of each epoch. Advantages are 1 of the best completion of a
        pair, −1 of the worst, 0 of others."""
        size = self._config.batch_size // self._config.group_size
        chosen = [_best_and_worst(group) for group in groups]
        batches = [
            self._batch([groups[place] for place in some], [chosen[place] for place in some], models)
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

    def _batch(self, groups: Sequence[JudgedGroup], chosen: Sequence[_Best], models: ModelRoles) -> Batch:
        pairs = [
            PairExample(group.samples[one.best].example(), group.samples[one.worst].example(), weight=float(one.differs))
            for group, one in zip(groups, chosen, strict=True)
        ]
        layout = models.mesh.layout
        longest = max(pair.tokens for pair in pairs)
        batch = pack_pair_examples(
            pairs,
            layout.row_length(longest),
            self._padding_id,
            row_count=layout.row_count,
            shares_prompts=models.shares_prefixes,
        )
        batch = placed(batch, self._pictures)
        if not self._needs_reference:
            return batch
        with torch.no_grad():
            log_probs_BT = of_all_rows(models, batch, lambda rows: models.log_probs(rows, REFERENCE))
        return batch.with_values(per_token={REFERENCE_LOG_PROBS: log_probs_BT})


def _best_and_worst(group: JudgedGroup) -> _Best:
    totals_G = group.totals_G
    if int((~totals_G.isnan()).sum()) < 2:
        return _Best(0, 0, False)
    best, worst = int(totals_G.nan_to_num(nan=-torch.inf).argmax()), int(totals_G.nan_to_num(nan=torch.inf).argmin())
    return _Best(best, worst, bool(totals_G[best] > totals_G[worst]))
