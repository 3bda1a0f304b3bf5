"""Rollouts, the source of batches of reinforcement learning: prompts are completed by the policy, judged, and become batches.

Figures of a rollout are logged, completions are kept with their rewards, and limits stop a policy that has collapsed.

Shapes: R samples of a rollout, P prompts, G samples of a prompt, K rewards, B rows, T tokens, S sequences.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer.core.errors import BessemerError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.metrics import MetricsLog
from bessemer.core.progress import Progress
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.posttraining.data.examples import drawn
from bessemer.posttraining.rewards.judge import Judgement, RewardError
from bessemer.posttraining.rl.advantages import is_informative
from bessemer.posttraining.rl.batches import AdvantageBatches, BatchMaker, PairBatches
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.policy_sampler import JudgedGroup, PolicySampler
from bessemer.posttraining.sampling.sampler import EncodedPrompt, SamplingEngine
from bessemer.posttraining.sampling.samples import Prompt, Sample, Share
from bessemer.training.data.batch import Batch
from bessemer.training.data.batches import rows_at
from bessemer.training.model_roles import ModelRoles

#: File of all completions with their rewards, one line each.
COMPLETIONS = "completions.jsonl"
#: Seconds of waiting in one rollout that are worth a line.
_LONG_WAIT = 5.0


@dataclass
class RolloutTally:
    """Counts of one rollout. equal: groups whose rewards do not differ. refills: None without dynamic sampling. failures: of
    rewards, by what went wrong. metrics: what rewards logged."""

    groups: int = 0
    equal: int = 0
    refills: int | None = None
    failures: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def add(self, judged: Judged) -> None:
        """Count the failures and the metrics of a group."""
        for failure, count in judged.failures.items():
            self.failures[failure] = self.failures.get(failure, 0) + count
        for name, values in judged.metrics.items():
            self.metrics.setdefault(name, []).extend(values)


def rollout_figures(
    samples: Sequence[Sample], groups: Sequence[JudgedGroup], totals_R: Tensor, tally: RolloutTally, names: Sequence[str]
) -> dict[str, float]:
    """Figures of a rollout for the metrics. names: of the rewards."""
    known = totals_R[~totals_R.isnan()]
    lengths = [len(sample.completion_ids) for sample in samples]
    figures = {
        "reward": float(known.mean()),
        "reward_std": float(known.std()) if len(known) > 1 else 0.0,
        "completion_tokens": statistics.fmean(lengths),
        "completion_tokens_max": float(max(lengths)),
        "cut_share": statistics.fmean(sample.is_cut for sample in samples),
        "dropped": float(totals_R.isnan().sum()),
    }
    if len(groups[0].samples) > 1:
        figures["equal_groups"] = tally.equal / tally.groups
    if tally.refills is not None:
        figures["refills"] = float(tally.refills)
    if len(names) > 1:
        rewards_RK = torch.cat([group.rewards_GK for group in groups])
        means = {f"reward_{name}": float(rewards_RK[:, k].nanmean()) for k, name in enumerate(names)}
        figures |= {name: value for name, value in means.items() if not math.isnan(value)}
    return figures


class CompletionsLog:
    """Every completion with its rewards, a line each."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """names: of the rewards."""
        self._path = folder / COMPLETIONS
        self._names = names
        self._log: MetricsLog | None = None

    def write(self, step: int, groups: Sequence[JudgedGroup], advantages_R: Tensor) -> None:
        """The rollout of a step, counted from 0; what the file holds of later ones is removed at the first call."""
        if self._log is None:
            self._log = MetricsLog(self._path, step or None)
        advantages = iter(advantages_R.tolist())
        for number, group in enumerate(groups):
            for place, sample in enumerate(group.samples):
                rewards = zip(self._names, group.rewards_GK[place].tolist(), strict=True)
                total = float(group.totals_G[place])
                row = {
                    "group": number,
                    "prompt": sample.prompt.text,
                    "completion": sample.text,
                    "tokens": len(sample.completion_ids),
                    "cut": sample.is_cut,
                    "rewards": {name: None if math.isnan(value) else value for name, value in rewards},
                    "reward": None if math.isnan(total) else total,
                    "advantage": next(advantages),
                }
                for name, value in group.extra[place].items():
                    # a user's column may have the name of one of ours
                    row[f"extra_{name}" if name in row or name == "step" else name] = value
                self._log.write(step + 1, **row)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


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


class Judged(NamedTuple):
    """The completions of a prompt. failures: of rewards, by what went wrong; metrics: what rewards logged; both of a share in
    its first."""

    group: JudgedGroup
    failures: Mapping[str, int]
    metrics: Mapping[str, Sequence[float]]


class RolloutSource:
    """Batches that the policy makes.

    A rollout is the completions of `config.groups` prompts, `group_size` each, all by the weights of one step. It is cut into
    mini-batches of whole groups, each of which is one step's batch, `rollout_epochs` times over; each further epoch has other
    mini-batches, of the groups in a new order. The samples of a group are compared when the rollout is made; their rows may lie
    in any micro-batch.
    """

    lookahead = 0

    def __init__(
        self,
        sampler: PolicySampler,
        prompts: Sequence[Prompt],
        out: Path,
        progress: Progress,
        held_out: Sequence[Prompt] = (),
    ) -> None:
        """sampler: completes the prompts; its tokenizer, settings, judge and seed are those of the source. Raises ConfigError
        for an unknown advantage."""
        tokenizer, config, judge, seed = sampler.tokenizer, sampler.config, sampler.judge, sampler.seed
        self._prompts = [(prompt, prompt.encoded(tokenizer)) for prompt in prompts]
        validated = drawn(held_out, config.validation_limit, derive_seed(seed, "validation"))
        self._held_out = [(prompt, prompt.encoded(tokenizer)) for prompt in validated]
        self._sampler = sampler
        self._judge = judge
        self._config = config
        shown = (prompt.pictures for prompt in (*prompts, *held_out))
        #: Writes pictures into batches, where any prompt has some.
        self._pictures = next((one.encoder for one in shown if one is not None), None)
        self._make: BatchMaker = AdvantageBatches(config, judge.weights, tokenizer.bos_id, self._pictures)
        if config.pair_loss is not None:
            self._make = PairBatches(config, tokenizer.bos_id, self._pictures)
        self._log = CompletionsLog(out, judge.names)
        self._seed = seed
        self._progress = progress
        #: Remaining batches of the rollout, and the step of the first of them.
        self._first = 0
        self._batches: list[Batch] = []
        #: Number of prompts sampled so far, over all epochs, and of tokens trained on.
        self._cursor, self._tokens = 0, 0
        self._metrics: dict[str, float] = {}
        self._has_hinted = False
        self.batch_size = config.batch_size
        prompts_and_columns = [[ids, dict(prompt.columns)] for prompt, ids in self._prompts]
        seen = [] if self._pictures is None else [self._pictures.file.table().fingerprint]
        self.fingerprint = hash_value([hash_value(repr(prompts_and_columns)), seed, *seen])

    # -- interface of the training loop

    def bind(self, models: ModelRoles) -> None:
        """The policy that samples, and the reference."""
        self._sampler.bind(models)

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
        """After a step: the remaining batches of the rollout, and the number of sampled prompts."""
        return {
            "first": self._first + 1,
            "batches": [_plain(batch) for batch in self._batches[1:]],
            "cursor": self._cursor,
            "tokens": self._tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first, self._cursor, self._tokens = state["first"], state["cursor"], state["tokens"]
        table = None if self._pictures is None else self._pictures.file.table()
        self._batches = [Batch(**values, pictures=table) for values in state["batches"]]

    # -- interface of the stage

    def take_metrics(self) -> dict[str, float]:
        """Metrics of the rollout since the last call; empty for further steps on the same rollout."""
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
        judged = self._judged_held_out(self._held_out)
        means = {"validation_reward": _mean(float(one.group.totals_G) for one in judged)}
        if len(self._judge.names) > 1:
            for place, name in enumerate(self._judge.names):
                means[f"validation_{name}"] = _mean(float(one.group.rewards_GK[0, place]) for one in judged)
        # a reward that judges none of them has no mean, and JSON has no NaN
        return {name: value for name, value in means.items() if not math.isnan(value)}

    def held_out_rewards(self, models: ModelRoles, limit: int) -> list[float]:
        """The reward of a greedy completion of each held-out prompt by another policy than the trained one, which is bound from
        then on; NaN where none is given."""
        models.version = self._config.steps or 0
        self.bind(models)
        return [float(one.group.totals_G) for one in self._judged_held_out(self._held_out[:limit])]

    def _judged_held_out(self, prompts: Sequence[EncodedPrompt]) -> list[Judged]:
        with self._sampler.sampling() as engine:
            return self._judged(engine, prompts, 1, self._sampler.models.version, greedy=True)

    def finish(self) -> None:
        """The run is over: forget what is kept for a resumed one."""

    def close(self) -> None:
        self._log.close()

    # -- one rollout

    def _batch_of(self, step: int) -> Batch:
        place = step - self._first
        if not 0 <= place < len(self._batches):
            self._roll_out(step)
            place = 0
        # earlier batches are used up
        self._first, self._batches = step, self._batches[place:]
        return self._batches[0]

    def _roll_out(self, step: int) -> None:
        config, tally = self._config, RolloutTally()
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
        made = self._make(groups, self._sampler.models, self._orders(step))
        self._first, self._batches = step, [*made.batches] * (config.updates // len(made.batches))
        # our own metrics override a reward's of the same name
        self._metrics |= {name: statistics.fmean(values) for name, values in tally.metrics.items()}
        self._metrics |= made.figures
        self._metrics |= rollout_figures(samples, groups, totals_R, tally, self._judge.names)
        for failure, count in tally.failures.items():
            self._progress.say(f"  {count:,} completions are dropped, the reward {failure}")
        self._metrics["rollout_seconds"] = round(sampled - start, 3)
        self._note_waits(sampled - start)
        if self._sampler.models.mesh.leads:
            self._log.write(step, groups, made.advantages_R)
        check_collapse(config, step, samples, totals_R, made.divergence_R)

    def _note_waits(self, seconds: float) -> None:
        """Log how long environments took, and say once what would help where they take most of a rollout in turn."""
        waited = self._sampler.take_waited()
        if waited is None:
            return
        self._metrics["environment_seconds"] = round(waited, 3)
        if self._sampler.waits_in_turn and waited > max(_LONG_WAIT, seconds / 2) and not self._has_hinted:
            self._has_hinted = True
            self._progress.say(
                f"  the environment took {waited:,.0f} of the rollout's {seconds:,.0f} s, one episode after the other; "
                "environment_threads: 32 lets them wait at once"
            )

    def _orders(self, step: int) -> list[list[int]]:
        """The order of groups in each epoch of a rollout after the first; none where all groups form one mini-batch."""
        config = self._config
        if config.mini_batches == 1:
            return []
        seeds = [derive_seed(self._seed, "mini-batches", step, epoch) for epoch in range(1, config.rollout_epochs)]
        return [np.random.default_rng(seed).permutation(config.groups).tolist() for seed in seeds]

    def _sampled_groups(self, engine: SamplingEngine, step: int, tally: RolloutTally) -> list[JudgedGroup]:
        """The rollout's groups; with dynamic sampling those whose rewards differ, as far as refills give them."""
        config = self._config
        kept: list[JudgedGroup] = []
        equal: list[JudgedGroup] = []
        for refill in range(1 + (config.most_refills if config.dynamic_sampling else 0)):
            judged = self._next_judged(engine, config.groups - len(kept), step, refill)
            groups = [one.group for one in judged]
            for one in judged:
                tally.add(one)
            informative = [bool(is_informative(group.totals_G, config.group_size)) for group in groups]
            tally.groups += len(groups)
            tally.equal += len(groups) - sum(informative)
            tally.refills = refill if config.dynamic_sampling else None
            for group, differs in zip(groups, informative, strict=True):
                (kept if differs or not config.dynamic_sampling else equal).append(group)
            if len(kept) >= config.groups:
                break
        return kept + equal[: config.groups - len(kept)]

    def _next_judged(self, engine: SamplingEngine, count: int, step: int, refill: int) -> list[Judged]:
        """The judged groups of the next prompts."""
        prompts = self._next_prompts(count)
        return self._judged(engine, prompts, self._config.group_size, step, seeds=("rollout", step, refill))

    def _judged(
        self,
        engine: SamplingEngine,
        prompts: Sequence[EncodedPrompt],
        number: int,
        step: int,
        *,
        seeds: tuple[str | int, ...] = (),
        greedy: bool = False,
    ) -> list[Judged]:
        """`number` judged completions of each prompt; under a mesh each group of ranks makes its share."""
        share = self._share()
        own, places = prompts[share.places], range(len(prompts))[share.places]
        samples: list[Sample] = []
        if share.leads or not share.of_first:
            samples = self._sampler.completions(engine, own, number, seeds=seeds, places=places, greedy=greedy)

        def judged() -> list[Judged]:
            if not samples:
                return []
            return self._grouped(samples, self._sampler.judged(samples, step), number)

        return share.gathered(judged)

    def _share(self) -> Share:
        """Which prompts this process samples."""
        return Share(self._sampler.models.mesh)

    def _grouped(self, samples: Sequence[Sample], judgement: Judgement, number: int) -> list[Judged]:
        """Judged samples by prompt, `number` of each."""
        failures = {": ".join(failure): count for failure, count in judgement.failures.items()}
        groups = self._sampler.groups_of(samples, judgement, number)
        return [
            Judged(group, {} if place else failures, {} if place else judgement.metrics) for place, group in enumerate(groups)
        ]

    def _next_prompts(self, count: int) -> list[EncodedPrompt]:
        """The next prompts, in a new order every epoch."""
        positions = np.arange(self._cursor, self._cursor + count)
        self._cursor += count
        return [self._prompts[place] for place in rows_at(positions, len(self._prompts), self._seed)]


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def _attended(batch: Batch) -> Tensor:
    """Tokens of prompts and completions; of rows that are one sequence, all of the row."""
    return torch.tensor(batch.tokens_BT.numel()) if batch.document_ids_BT is None else (batch.document_ids_BT > 0).sum()


def _plain(batch: Batch) -> dict[str, Any]:
    """A batch as tensors and plain values, for a checkpoint; its pictures are the run's."""
    return {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in vars(batch).items()
        if value is not None and name != "pictures"
    }
