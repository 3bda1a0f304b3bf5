"""Samples of the policy that are episodes of an environment: several turns, with tools, in place of one completion."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bessemer.assistant.assistant import Assistant
from bessemer.assistant.environment import Environment
from bessemer.assistant.episodes import Episode, play
from bessemer.assistant.models import EngineModel
from bessemer.core.errors import ConfigError
from bessemer.core.seeds import derive_seed
from bessemer.core.usercode import load_user_function
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.posttraining.formats import plain_turns
from bessemer.posttraining.rewards.environment import ENVIRONMENT, FAILURE, TOTAL
from bessemer.posttraining.rewards.judge import Judge, Judgement
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.sampler import EncodedPrompt, PolicySampler, SamplingEngine
from bessemer.posttraining.rl.samples import Sample
from bessemer.tokenization.tokenizer import Tokenizer


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
