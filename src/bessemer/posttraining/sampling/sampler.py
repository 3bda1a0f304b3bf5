"""Samplers of the policy: prompts completed by the engine with the current weights, and judged.

A sample is one completion, or an episode of an environment: several turns, with tools.

Shapes: R samples, G samples of a prompt, K rewards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bessemer.assistant.assistant import Assistant, EngineModel
from bessemer.assistant.episodes import Environment, Episode, play
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.core.usercode import load_user_function
from bessemer.inference.collective import CollectiveEngine
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.compiled_steps import CompiledSteps
from bessemer.inference.execution.steps.plain import MOST_TOKENS
from bessemer.model.adapters.trained import adapters_of, merged_in_place, without_adapters
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.quantised_layers import is_quantised
from bessemer.posttraining.data.formats import plain_turns
from bessemer.posttraining.rewards.judge import Completed, Judge, Judgement
from bessemer.posttraining.rewards.rule_based import ENVIRONMENT, FAILURE, TOTAL
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.sampling.prompts import Prompt
from bessemer.posttraining.sampling.samples import Sample
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.adapter_config import KERNELS_OVER_CODES
from bessemer.training.model_roles import Trainee
from bessemer.training.objectives import POLICY

#: Completions that the engine computes at once, and tokens that a step has room for in any case.
_MOST_SEQUENCES, _LEAST_BATCHED_TOKENS = 256, 512

SamplingEngine = Engine | CollectiveEngine

#: What the engine calls an adapter that is trained.
_ADAPTER = "policy"

#: A prompt and its tokens.
EncodedPrompt = tuple[Prompt, list[int]]


@dataclass(frozen=True)
class Group:
    """The samples of a prompt and what they are worth: rewards_GK, NaN where none is given, and their totals_G."""

    samples: Sequence[Sample]
    rewards_GK: Tensor
    totals_G: Tensor
    extra: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class SamplerSettings:
    """How prompts are completed. context_length: most tokens of a prompt and its completion. sequences: completions that are
    asked for at once. stop: texts at which a completion ends; None: those of its prompt. cpu_kernels: of the engine."""

    temperature: float
    max_tokens: int
    context_length: int
    sequences: int
    stop: Sequence[str] | None = None
    cpu_kernels: Literal["auto", "on", "off"] = "auto"


class Sampler:
    """Completes prompts with the policy's weights of now.

    An adapter in training is merged into the weights while compiled kernels sample, since they pack the weights in any case.
    Elsewhere the engine has it beside the weights, of which there is no second copy in one process.
    """

    def __init__(self, tokenizer: Tokenizer, settings: SamplerSettings, seed: int) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._seed = seed
        self._trainee: Trainee | None = None
        self._engine: SamplingEngine | None = None
        #: What the engine is asked for: the policy's adapter, where it is beside the weights.
        self.adapter: str | None = None

    def bind(self, trainee: Trainee) -> None:
        """The models of the run."""
        self._trainee = trainee

    @property
    def trainee(self) -> Trainee:
        """The models of the run."""
        assert self._trainee is not None, "the training loop binds its models before the first batch"
        return self._trainee

    @contextmanager
    def sampling(self) -> Iterator[SamplingEngine]:
        """The engine with the policy's weights of now, of all processes of a mesh. The random state is left as it is."""
        trainee = self.trainee
        with trainee.prepared(POLICY) as prepared, torch.random.fork_rng(), ExitStack() as entered:
            model = prepared.model
            entered.enter_context(without_adapters(model))
            kernels = self._kernels(model)
            if adapters_of(model):
                merges = kernels == "on" and trainee.mesh.alone
                self.adapter = None if merges else _ADAPTER
                if merges:
                    entered.enter_context(merged_in_place(model))
            if self._engine is None:
                self._engine = self._new_engine(model, kernels)
            if self.adapter is None:
                self._engine.update_weights(version=trainee.version)
            else:
                self._engine.update_adapter(self.adapter, trainee.adapter(), version=trainee.version)
            yield self._engine

    def _new_engine(self, model: Decoder, kernels: Literal["auto", "on", "off"]) -> SamplingEngine:
        trainee, settings = self.trainee, self._settings
        sequences = min(max(settings.sequences, 1), _MOST_SEQUENCES)
        config = EngineConfig(
            max_model_len=min(settings.context_length, model.config.max_position_embeddings),
            max_num_seqs=sequences,
            max_num_batched_tokens=max(_LEAST_BATCHED_TOKENS, MOST_TOKENS * sequences),
            cpu_kernels=kernels,
            # beside codes the engine keeps keys and values in half precision, which the trainer does not
            kv_cache_dtype="float32" if is_quantised(model) and trainee.runtime.dtype == "float32" else "auto",
            threads=trainee.runtime.threads,
        )
        engine: SamplingEngine
        if trainee.mesh.alone:
            engine = Engine(model, self._tokenizer, config=config)
        else:
            engine = CollectiveEngine(model, self._tokenizer, trainee.mesh, config)
        if self.adapter is not None:
            engine.load_adapter(self.adapter, trainee.adapter())
        return engine

    def _kernels(self, model: Decoder) -> Literal["auto", "on", "off"]:
        """The setting, with `auto` decided in one process: compiled kernels where they compute the whole model in the trainer's
        type. Packing the weights at each rollout takes less time than they save in a few tokens.

        Raises ConfigError where they would multiply by codes, for which they round activations to 8 bits: the trainer does not.
        """
        setting = self._settings.cpu_kernels
        if is_quantised(model):
            if setting == "on":
                raise ConfigError(KERNELS_OVER_CODES)
            return "off"
        if (
            setting != "auto"
            or not self.trainee.mesh.alone
            or self.trainee.runtime.dtype != "float32"
            or CompiledSteps.supports(model) is not None
        ):
            return setting
        return "on"

    def completions(
        self,
        engine: SamplingEngine,
        asked: Sequence[EncodedPrompt],
        number: int,
        *,
        seeds: tuple[str | int, ...] = (),
        places: Sequence[int] | None = None,
        greedy: bool = False,
    ) -> list[Sample]:
        """`number` completions of each prompt, those of a prompt one after the other.

        seeds, places: what the draws of each prompt depend on; its place among all asked, where these are some of them.
        """
        if not asked:
            # of a group without a prompt, whose ranks take part all the same
            engine.rollouts([], number, [], adapter=self.adapter)
            return []
        settings = self._settings
        params = [
            SamplingParams(
                temperature=0.0 if greedy else settings.temperature,
                max_tokens=settings.max_tokens,
                stop=list(prompt.stop if settings.stop is None else settings.stop),
                seed=derive_seed(self._seed, *seeds, place),
            )
            for place, (prompt, _) in zip(range(len(asked)) if places is None else places, asked, strict=True)
        ]
        found = engine.rollouts([ids for _, ids in asked], number, params, adapter=self.adapter)
        samples = []
        for row in range(len(asked) * number):
            first, end = int(found.prompt_lengths[row]), int(found.lengths[row])
            samples.append(
                Sample(
                    asked[row // number][0],
                    found.tokens[row, :end].tolist(),
                    first,
                    found.log_probs[row, first:end].tolist(),
                    found.texts[row],
                    found.finish_reasons[row] == "length",
                )
            )
        return samples


class PolicySampler(Sampler):
    """Completes prompts with the policy's weights of now, and judges what it completed."""

    def __init__(self, judge: Judge, tokenizer: Tokenizer, config: RLConfig, seed: int) -> None:
        settings = SamplerSettings(
            config.temperature,
            config.max_tokens,
            config.context_length,
            config.batch_size * config.mini_batches,
            config.stop,
            config.cpu_kernels,
        )
        super().__init__(tokenizer, settings, seed)
        self.judge = judge
        self._config = config

    def judged(self, samples: Sequence[Sample], step: int) -> Judgement:
        """What the rewards say of samples; a completion that was cut is worth nothing where the settings say so."""
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
        judgement = self.judge.judge(completed, step=step, steps=self._config.steps or 0)
        if self._config.truncated != "zero":
            return judgement
        totals = [
            0.0 if sample.is_cut and not math.isnan(total) else total
            for sample, total in zip(samples, judgement.totals, strict=True)
        ]
        return replace(judgement, totals=totals)

    def groups_of(self, samples: Sequence[Sample], judgement: Judgement, size: int) -> list[Group]:
        """Judged samples by prompt, `size` of each, NaN where a sample is left out."""
        totals_R = torch.tensor(judgement.totals, dtype=torch.float64)
        rewards_RK = torch.tensor(
            [[math.nan if value is None else value for value in values] for values in judgement.values], dtype=torch.float64
        ).T.clone()
        if self._config.truncated == "drop":
            totals_R[torch.tensor([sample.is_cut for sample in samples])] = math.nan
        # a failure of one reward leaves the whole sample out
        rewards_RK[totals_R.isnan()] = math.nan
        extra = [{name: _readable(values[place]) for name, values in judgement.extra.items()} for place in range(len(samples))]
        places = [slice(start, start + size) for start in range(0, len(samples), size)]
        return [Group(samples[place], rewards_RK[place], totals_R[place], extra[place]) for place in places]


def _readable(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


class EpisodeSampler(PolicySampler):
    """Plays episodes with the policy's weights of now.

    A prompt's row is the task: its columns, and `prompt`. What the environment said it was worth, and why it broke off, are
    columns for the rewards, which are asked about the assistant's last message.
    """

    def __init__(
        self, judge: Judge, tokenizer: Tokenizer, config: RLConfig, seed: int, new_environment: Callable[[], Environment]
    ) -> None:
        super().__init__(judge, tokenizer, config, seed)
        self._new_environment = new_environment

    def judged(self, samples: Sequence[Sample], step: int) -> Judgement:
        """As of `PolicySampler`; an episode that broke off is left out, whatever the rewards say of it, and counted."""
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
        asked: Sequence[EncodedPrompt],
        number: int,
        *,
        seeds: tuple[str | int, ...] = (),
        places: Sequence[int] | None = None,
        greedy: bool = False,
    ) -> list[Sample]:
        assert isinstance(engine, Engine), "episodes are played in one process"
        config = self._config
        each_of = [(place, each) for place in range(len(asked)) for each in range(number)]
        params = SamplingParams(
            temperature=0.0 if greedy else config.temperature, max_tokens=config.max_tokens, stop=list(config.stop or ())
        )
        episodes = play(
            Assistant(EngineModel(engine, adapter=self.adapter)),
            [self._new_environment() for _ in each_of],
            [_task(asked[place]) for place, _ in each_of],
            params,
            max_turns=config.max_turns,
            seeds=[derive_seed(self._seed, *seeds, place, each) for place, each in each_of],
        )
        return [_sample(asked[place], episode) for (place, _), episode in zip(each_of, episodes, strict=True)]


def load_environment(name: str, folder: Path) -> Callable[[], Environment]:
    """The user's function that makes an environment, tried once. Raises ConfigError where it cannot be loaded, or fails."""
    function = load_user_function(name, folder)
    try:
        made = function()
    except Exception as error:  # anything a user's function may raise
        raise ConfigError(f"environment: {name} fails: {type(error).__name__}: {error}") from None
    missing = [method for method in ("tools", "reset", "step") if not hasattr(made, method)]
    if missing:
        raise ConfigError(f"environment: what {name} makes has no {' and no '.join(missing)}")
    return function


def _task(asked: EncodedPrompt) -> dict[str, Any]:
    prompt, _ = asked
    return {**prompt.columns, "prompt": plain_turns(prompt.turns)}


def _sample(asked: EncodedPrompt, episode: Episode) -> Sample:
    prompt, ids = asked
    judged = replace(prompt, columns={**prompt.columns, TOTAL: episode.total, FAILURE: episode.failure})
    transcript = episode.transcript
    if not any(transcript.is_own):
        # it broke off before the policy wrote anything: it is left out, and has no target
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
    )
