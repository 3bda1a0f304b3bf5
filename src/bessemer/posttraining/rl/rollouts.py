"""The batches of reinforcement learning: prompts are completed by the policy, judged, and become advantages.

Shapes: R samples of a rollout, P prompts, G samples of a prompt, K rewards, B rows, T tokens, S sequences.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bessemer.core.hashing import hash_value
from bessemer.core.progress import Progress
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.inference.engine import Engine
from bessemer.posttraining.rewards.judge import Judge, RewardError
from bessemer.posttraining.rl.advantages import ADVANTAGES, decoupled, is_informative
from bessemer.posttraining.rl.collapse import check_collapse
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.objective import ADVANTAGES as ADVANTAGE_VALUES
from bessemer.posttraining.rl.objective import OLD, REFERENCE_LOG_PROBS
from bessemer.posttraining.rl.prompts import Prompt
from bessemer.posttraining.rl.record import CompletionsLog, Tally, rollout_figures
from bessemer.posttraining.rl.sampler import EncodedPrompt, Group, PolicySampler
from bessemer.posttraining.rl.samples import Packed, Sample, pack_samples
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import IGNORE_INDEX, Batch, rows_of_step
from bessemer.training.objectives import POLICY
from bessemer.training.trainee import REFERENCE, Trainee


class RolloutBatches:
    """Batches that the policy makes.

    A rollout is the completions of `config.groups` prompts, `group_size` each, all by the weights of one step. It is cut into
    mini-batches of whole groups, each of which is one step's batch, `rollout_epochs` times over. The samples of a group are
    compared when the rollout is made; their rows may lie in any micro-batch.
    """

    lookahead = 0

    def __init__(
        self,
        prompts: Sequence[Prompt],
        judge: Judge,
        tokenizer: Tokenizer,
        config: RLConfig,
        out: Path,
        *,
        seed: int,
        progress: Progress,
        held_out: Sequence[Prompt] = (),
    ) -> None:
        """Raises ConfigError for an advantage that there is not."""
        self._prompts = [(prompt, prompt.encoded(tokenizer)) for prompt in prompts]
        self._held_out = [(prompt, prompt.encoded(tokenizer)) for prompt in held_out[: config.validation_limit]]
        self._sampler = PolicySampler(judge, tokenizer, config, seed)
        self._judge = judge
        self._padding_id = tokenizer.bos_id
        self._config = config
        self._advantage = ADVANTAGES.find(config.advantage).load()
        self._log = CompletionsLog(out, judge.names)
        self._seed = seed
        self._progress = progress
        #: The step of the first of the batches under way, and these.
        self._first = 0
        self._batches: list[Batch] = []
        #: Prompts that were sampled, over all epochs, and tokens that were trained on.
        self._cursor, self._tokens = 0, 0
        self._metrics: dict[str, float] = {}
        self.batch_size = config.batch_size
        asked = [[ids, dict(prompt.columns)] for prompt, ids in self._prompts]
        self.fingerprint = hash_value([hash_value(repr(asked)), seed])

    # -- what the training loop asks

    def bind(self, trainee: Trainee) -> None:
        """The policy that samples, and the reference."""
        self._sampler.bind(trainee)

    def batch_size_at(self, step: int) -> int:
        """Rows of the batch of `step`: its completions packed. Samples, where the rollout before it is used up."""
        return self._batch_of(step).tokens_BT.shape[0]

    def batch(self, step: int, rows: slice, mesh: Mesh = ALONE) -> Batch:
        """The rows of the batch of `step`.

        Raises RewardError where no completion has a reward, CollapseError for a policy beyond its limits.
        """
        batch = self._batch_of(step)
        self._tokens += int(_attended(batch))
        return batch.rows(rows)

    def state_dict(self) -> dict[str, Any]:
        """After a step: the batches that are left of the rollout, and how many prompts were sampled."""
        return {
            "first": self._first + 1,
            "batches": [_plain(batch) for batch in self._batches[1:]],
            "cursor": self._cursor,
            "tokens": self._tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        self._first, self._cursor, self._tokens = state["first"], state["cursor"], state["tokens"]
        self._batches = [Batch(**values) for values in state["batches"]]

    # -- what the stage asks

    def take_metrics(self) -> dict[str, float]:
        """Figures of the rollout since the last call; empty of steps that go on with one."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    @property
    def trained_tokens(self) -> int:
        """Tokens of prompts and completions in the batches so far."""
        return self._tokens

    def validate(self) -> dict[str, float]:
        """`validation_reward` and `validation_NAME` of each reward: means over greedy completions of the held-out prompts."""
        if not self._held_out:
            return {}
        with self._sampler.sampling() as engine:
            samples = self._sampler.completions(engine, self._held_out, 1, greedy=True)
            judgement = self._sampler.judged(samples, 0)
        means = {"validation_reward": _mean(judgement.totals)}
        if len(self._judge.names) > 1:
            named = zip(self._judge.names, judgement.values, strict=True)
            means |= {f"validation_{name}": _mean([value for value in values if value is not None]) for name, values in named}
        return means

    def close(self) -> None:
        """Close the log of completions."""
        self._log.close()

    # -- one rollout

    def _batch_of(self, step: int) -> Batch:
        place = step - self._first
        if not 0 <= place < len(self._batches):
            self._roll_out(step)
            place = 0
        # those before are done with
        self._first, self._batches = step, self._batches[place:]
        return self._batches[0]

    def _roll_out(self, step: int) -> None:
        config, tally = self._config, Tally()
        if step == 0:
            self._metrics |= {f"{name}_before": value for name, value in self.validate().items()}
        start = time.perf_counter()
        with self._sampler.sampling() as engine:
            groups = self._sampled_groups(engine, step, tally)
        sampled = time.perf_counter()
        totals_R = torch.cat([group.totals_G for group in groups])
        samples = [sample for group in groups for sample in group.samples]
        if bool(totals_R.isnan().all()):
            reasons = "; ".join(tally.failures) or "no reward judges them"
            raise RewardError(f"step {step + 1:,}: none of the {len(samples):,} completions has a reward: {reasons}")
        packed = self._packed(samples, totals_R)
        kl_R = self._with_log_probs(packed)
        rewards_R = totals_R
        if config.kl == "reward" and config.beta:
            rewards_R = totals_R - config.beta * kl_R
        if config.reward_scale == "decoupled":
            weights_K = torch.tensor(self._judge.weights)
            rewards_RK = torch.cat([group.rewards_GK for group in groups])
            advantages_R = decoupled(rewards_RK, weights_K, config.group_size)
        else:
            advantages_R = self._advantage(rewards_R, config.group_size)
        batches = self._batches_of(packed, totals_R, advantages_R)
        self._first, self._batches = step, batches * config.rollout_epochs
        self._metrics |= rollout_figures(samples, groups, totals_R, tally, self._judge.names)
        for failure, count in tally.failures.items():
            self._progress.say(f"  {count:,} completions are dropped, the reward {failure}")
        self._metrics["rollout_seconds"] = round(sampled - start, 3)
        self._log.write(step, groups, advantages_R)
        check_collapse(config, step, samples, kl_R)

    def _sampled_groups(self, engine: Engine, step: int, tally: Tally) -> list[Group]:
        """The rollout's groups; with dynamic sampling those whose rewards differ, as far as refills give them."""
        config = self._config
        kept: list[Group] = []
        equal: list[Group] = []
        for refill in range(1 + (config.most_refills if config.dynamic_sampling else 0)):
            asked = self._next_prompts(config.groups - len(kept))
            samples = self._sampler.completions(engine, asked, config.group_size, seeds=("rollout", step, refill))
            judgement = self._sampler.judged(samples, step)
            for failure, count in judgement.failures.items():
                tally.failures[": ".join(failure)] = tally.failures.get(": ".join(failure), 0) + count
            groups = self._sampler.groups_of(samples, judgement)
            informative = [bool(is_informative(group.totals_G, config.group_size)) for group in groups]
            tally.groups += len(groups)
            tally.equal += len(groups) - sum(informative)
            tally.refills = refill if config.dynamic_sampling else None
            for group, differs in zip(groups, informative, strict=True):
                (kept if differs or not config.dynamic_sampling else equal).append(group)
            if len(kept) >= config.groups:
                break
        return kept + equal[: config.groups - len(kept)]

    def _next_prompts(self, count: int) -> list[EncodedPrompt]:
        """The next prompts, in a new order every epoch."""
        positions = range(self._cursor, self._cursor + count)
        self._cursor += count
        order = (int(rows_of_step(position, 1, len(self._prompts), self._seed)[0]) for position in positions)
        return [self._prompts[place] for place in order]

    # -- from samples to batches

    def _packed(self, samples: Sequence[Sample], totals_R: Tensor) -> list[Packed]:
        """The mini-batches of the rollout. Samples without a reward have no targets."""
        size, kept = self._config.batch_size, (~totals_R.isnan()).tolist()
        places = [slice(start, start + size) for start in range(0, len(samples), size)]
        return [pack_samples(samples[place], kept[place], self._padding_id) for place in places]

    def _with_log_probs(self, packed: list[Packed]) -> Tensor:
        """Adds the log-probabilities that do not change while the rollout is trained on: of the policy as old, where more than
        one update follows or the divergence is in the reward; of the reference. Returns each sample's divergence from the
        reference, Σ log π − log π_ref, (R,); zeros without a reference."""
        config, trainee = self._config, self._sampler.trainee
        parts: list[Tensor] = []
        with torch.no_grad():
            for place, one in enumerate(packed):
                values: dict[str, Tensor] = {}
                batch = one.batch
                if config.updates > 1:
                    values[OLD] = trainee.log_probs(batch, POLICY, temperature=config.temperature)
                if config.beta:
                    values[REFERENCE_LOG_PROBS] = trainee.log_probs(batch, REFERENCE, temperature=config.temperature)
                    own_BT = values.get(OLD, batch.per_token["sampler_log_probs"])
                    ratios_BT = (own_BT - values[REFERENCE_LOG_PROBS]) * (batch.targets_BT != IGNORE_INDEX)
                    parts.append(one.of_samples(batch.sequence_sums(ratios_BT)))
                else:
                    parts.append(torch.zeros(len(one.rows_R)))
                packed[place] = Packed(batch.with_values(per_token=values), one.rows_R, one.columns_R)
        return torch.cat(parts).double()

    def _batches_of(self, packed: Sequence[Packed], totals_R: Tensor, advantages_R: Tensor) -> list[Batch]:
        size, group = self._config.batch_size, self._config.group_size
        batches = []
        for number, one in enumerate(packed):
            place = slice(number * size, (number + 1) * size)
            totals, batch = totals_R[place], one.batch
            tokens_R = one.of_samples(batch.sequence_sums((batch.targets_BT != IGNORE_INDEX).float()))
            tokens_PG = tokens_R.view(-1, group)
            per_sample = {
                "reward": totals.nan_to_num(nan=0.0),
                "group": torch.arange(size) // group,
                "group_tokens": tokens_PG.sum(1, keepdim=True).expand_as(tokens_PG).flatten(),
                "group_answers": (tokens_PG > 0).sum(1, keepdim=True).expand_as(tokens_PG).flatten().float(),
            }
            per_sequence = {name: one.of_sequences(values.float()) for name, values in per_sample.items()}
            advantages_BT = batch.of_tokens(one.of_sequences(advantages_R[place].float()))
            batches.append(batch.with_values(per_token={ADVANTAGE_VALUES: advantages_BT}, per_sequence=per_sequence))
        return batches


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def _attended(batch: Batch) -> Tensor:
    """Tokens of prompts and completions; of rows that are one sequence, all of the row."""
    return torch.tensor(batch.tokens_BT.numel()) if batch.document_ids_BT is None else (batch.document_ids_BT > 0).sum()


def _plain(batch: Batch) -> dict[str, Any]:
    """A batch as tensors and plain values, for a checkpoint."""
    return {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(batch).items() if value is not None
    }
