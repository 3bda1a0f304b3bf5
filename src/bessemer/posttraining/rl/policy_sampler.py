"""The samplers of `rl`: completions, or episodes of an environment, and what the rewards say of them.

An episode has several turns, with tools.

Shapes: R samples, G samples of a prompt, K rewards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bessemer.assistant.assistant import Assistant, EngineModel
from bessemer.assistant.episodes import Environment, Episode, play
from bessemer.core.concurrency import DaemonThreads
from bessemer.core.hashing import derive_seed
from bessemer.inference.collective import CollectiveEngine
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.posttraining.data.formats import plain_turns
from bessemer.posttraining.rewards.judge import Completed, Judge, Judgement
from bessemer.posttraining.rewards.rule_based import ENVIRONMENT, FAILURE, TOTAL
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.sampling.sampler import EncodedPrompt, Sampler, SamplerSettings, SamplingEngine
from bessemer.posttraining.sampling.samples import Sample
from bessemer.posttraining.sampling.served_policy import ServedModel, ServedPolicy
from bessemer.tokenization.tokenizer import Tokenizer

#: Threads of a rollout whose environment has the attribute `waits`, where no setting gives their number.
DEFAULT_THREADS = 32


@dataclass(frozen=True)
class JudgedGroup:
    """The samples of a prompt and their rewards: rewards_GK, NaN where none is given, and the totals_G."""

    samples: Sequence[Sample]
    rewards_GK: Tensor
    totals_G: Tensor
    extra: Sequence[Mapping[str, Any]]


class PolicySampler(Sampler):
    """Completes prompts with the policy's current weights, and judges the completions."""

    def __init__(
        self, judge: Judge, tokenizer: Tokenizer, config: RLConfig, seed: int, servers: ServedPolicy | None = None
    ) -> None:
        settings = SamplerSettings(
            config.temperature,
            config.max_tokens,
            config.context_length,
            config.batch_size * config.mini_batches,
            config.stop,
            config.cpu_kernels,
            config.sleep,
            config.sampler_weights,
        )
        super().__init__(tokenizer, settings, seed, servers)
        self.judge = judge
        self.config = config

    def judged(self, samples: Sequence[Sample], step: int) -> Judgement:
        """Rewards of samples; with `truncated: zero` a cut completion gets 0."""
        names = dict.fromkeys(name for sample in samples for name in sample.prompt.columns)
        completed = Completed(
            prompts=[plain_turns(sample.prompt.turns) for sample in samples],
            completions=[
                sample.text if isinstance(sample.prompt.turns, str) else [{"role": "assistant", "content": sample.text}]
                for sample in samples
            ],
            completion_ids=[list(sample.completion_ids) for sample in samples],
            columns={name: [sample.prompt.columns.get(name) for sample in samples] for name in names},
        )
        judgement = self.judge.judge(completed, step=step, steps=self.config.steps or 0)
        if self.config.truncated != "zero":
            return judgement
        totals = [
            0.0 if sample.is_cut and not math.isnan(total) else total
            for sample, total in zip(samples, judgement.totals, strict=True)
        ]
        return replace(judgement, totals=totals)

    def take_waited(self) -> float | None:
        """Seconds that episodes spent in their environments since the last call, added up; None without environments."""
        return None

    @property
    def waits_in_turn(self) -> bool:
        """Whether environments are called one after the other, and no setting asked for that."""
        return False

    def groups_of(self, samples: Sequence[Sample], judgement: Judgement, size: int) -> list[JudgedGroup]:
        """Samples and their rewards grouped by prompt, `size` samples each; rewards of a sample that is left out are NaN."""
        totals_R = torch.tensor(judgement.totals, dtype=torch.float64)
        rewards_RK = torch.tensor(
            [[math.nan if value is None else value for value in values] for values in judgement.values], dtype=torch.float64
        ).T.clone()
        if self.config.truncated == "drop":
            totals_R[torch.tensor([sample.is_cut for sample in samples])] = math.nan
        # a sample with one failed reward is left out as a whole
        rewards_RK[totals_R.isnan()] = math.nan
        extra = [{name: _readable(values[place]) for name, values in judgement.extra.items()} for place in range(len(samples))]
        places = [slice(start, start + size) for start in range(0, len(samples), size)]
        return [JudgedGroup(samples[place], rewards_RK[place], totals_R[place], extra[place]) for place in places]


def _readable(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


class EpisodeSampler(PolicySampler):
    """Plays episodes with the policy's current weights.

    A prompt's row is the task: its columns, and `prompt`. What the environment said it was worth, and why it broke off, are
    columns for the rewards, which are asked about the assistant's last message.
    """

    def __init__(
        self,
        judge: Judge,
        tokenizer: Tokenizer,
        config: RLConfig,
        seed: int,
        new_environment: Callable[[], Environment],
        servers: ServedPolicy | None = None,
    ) -> None:
        super().__init__(judge, tokenizer, config, seed, servers)
        self._new_environment = new_environment
        number = config.environment_threads
        if servers is not None:
            # each episode waits either for its completion or for its environment
            number = max(number or 0, servers.pool.concurrency * config.group_size)
        self._waits = True if servers is not None or config.environment_threads else None if number is None else False
        number = DEFAULT_THREADS if number is None else number
        self._threads = DaemonThreads(number, "episodes") if number else None
        self._waited = 0.0
        self._says_it_waits = False

    def take_waited(self) -> float | None:
        waited, self._waited = self._waited, 0.0
        return waited

    @property
    def waits_in_turn(self) -> bool:
        return self._waits is None and not self._says_it_waits

    def judged(self, samples: Sequence[Sample], step: int) -> Judgement:
        """As `PolicySampler.judged`; an episode that broke off is left out and counted."""
        judgement = super().judged(samples, step)
        failures = Counter(judgement.failures)
        totals = list(judgement.totals)
        for place, sample in enumerate(samples):
            if failure := sample.prompt.columns[FAILURE]:
                totals[place] = math.nan
                failures[ENVIRONMENT, failure] += 1
        return replace(judgement, totals=totals, failures=failures)

    def completions(
        self,
        engine: SamplingEngine,
        prompts: Sequence[EncodedPrompt],
        number: int,
        *,
        seeds: tuple[str | int, ...] = (),
        places: Sequence[int] | None = None,
        greedy: bool = False,
    ) -> list[Sample]:
        assert not isinstance(engine, CollectiveEngine), "episodes are played in one process"
        config = self.config
        model: EngineModel | ServedModel
        if isinstance(engine, Engine):
            model = EngineModel(engine, adapter=self.adapter)
        else:
            length = min(config.context_length, engine.context_length or config.context_length)
            model = ServedModel(engine, self.tokenizer, length)
        each_of = [(place, each) for place in range(len(prompts)) for each in range(number)]
        params = SamplingParams(
            temperature=0.0 if greedy else config.temperature, max_tokens=config.max_tokens, stop=list(config.stop or ())
        )
        environments = [self._new_environment() for _ in each_of]
        self._says_it_waits = any(getattr(one, "waits", False) for one in environments)
        episodes = play(
            Assistant(model),
            environments,
            [_task(prompts[place]) for place, _ in each_of],
            params,
            max_turns=config.max_turns,
            seeds=[derive_seed(self.seed, *seeds, place, each) for place, each in _numbered(each_of, places)],
            threads=self._threads,
            waits=self._waits,
        )
        self._waited += sum(episode.waited for episode in episodes)
        return [_sample(prompts[place], episode) for (place, _), episode in zip(each_of, episodes, strict=True)]


def _numbered(each_of: Sequence[tuple[int, int]], places: Sequence[int] | None) -> list[tuple[int, int]]:
    """Of each episode the place of its prompt among all, and its number."""
    return [(place if places is None else places[place], each) for place, each in each_of]


def _task(encoded: EncodedPrompt) -> dict[str, Any]:
    prompt, _ = encoded
    return {**prompt.columns, "prompt": plain_turns(prompt.turns)}


def _sample(encoded: EncodedPrompt, episode: Episode) -> Sample:
    prompt, ids = encoded
    judged = replace(prompt, columns={**prompt.columns, TOTAL: episode.total, FAILURE: episode.failure})
    transcript = episode.transcript
    if not any(transcript.is_own):
        # an episode that broke off before the policy wrote anything has no target
        return Sample(judged, [*ids, ids[-1]], len(ids), [0.0], "", is_cut=False)
    answers = [message.text for message in episode.conversation.messages if message.role == "assistant"]
    return Sample(
        judged,
        transcript.ids,
        transcript.is_own.index(True),
        [log_prob for log_prob, is_own in zip(transcript.log_probs, transcript.is_own, strict=True) if is_own],
        answers[-1] if answers else "",
        is_cut=episode.end == "length",
        is_own=transcript.is_own,
        versions=[one for one, is_own in zip(transcript.weight_versions, transcript.is_own, strict=True) if is_own],
    )
