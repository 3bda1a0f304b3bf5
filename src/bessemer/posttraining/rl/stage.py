"""The stage `rl`: a policy learns from rewards of what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.hashing import derive_seed
from bessemer.core.progress import Progress, Silent
from bessemer.core.stage import OpenTasks
from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import holds_codes
from bessemer.posttraining.preference.config import PAIR_LOSSES
from bessemer.posttraining.rewards.config import RewardContext
from bessemer.posttraining.rewards.judge import Judge
from bessemer.posttraining.rl.advantages import CRITIC, ActorCriticObjective
from bessemer.posttraining.rl.batches import pair_objective
from bessemer.posttraining.rl.config import CriticConfig, RLConfig
from bessemer.posttraining.rl.objective import PolicyObjective
from bessemer.posttraining.rl.rollouts import RolloutSource
from bessemer.posttraining.sampling.prompts import Prompt, gather_prompts
from bessemer.posttraining.sampling.sampler import EpisodeSampler, load_environment
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.autotune import Plan, prepare_run, seconds_per_step
from bessemer.training.data.batches import BatchSource
from bessemer.training.job import OnStepEnd, run_training
from bessemer.training.model_roles import REFERENCE
from bessemer.training.model_setup import open_beside
from bessemer.training.objectives import Objective
from bessemer.training.optim.lr_schedule import validated_steps
from bessemer.training.trainer import Trainer


def rl(
    config: RLConfig,
    model: Path,
    out: Path,
    *,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
    folder: Path = Path(),
    card_flops: Callable[[str], float | None] = lambda name: None,
    tasks: OpenTasks | None = None,
    reward_model: Path | None = None,
    only_resolve: bool = False,
) -> dict[str, Any]:
    """Train the model of folder `model` by the rewards of its completions; resumes from `out`.

    Writes below `out`: `model/`, with an adapter `adapter/`, `metrics.jsonl`, `completions.jsonl` (every completion with its
    rewards), `autotune.json`, `checkpoints/`. With an adapter the reference is the policy without it. Files that the settings
    name are relative to `folder`. reward_model: the folder of the one that judges, or that a critic starts from, where the
    settings say so. only_resolve: measure, and raise SettingsResolvedError with the settings. Returns the headline metrics.
    Raises SourceError for prompts that are missing or malformed, ConfigError for rewards that cannot be given and for a
    pipeline, RewardError where no completion has a reward, CollapseError for a policy beyond its limits, and what
    `run_training` raises.
    """
    progress = progress or Silent()
    tokenizer = load_tokenizer(model)
    objective: Objective = PolicyObjective.of(config) if config.pair_loss is None else pair_objective(config)
    gathered = gather_prompts(config, folder, seed)
    training = _fitting(gathered.training, tokenizer, config)
    held_out = _fitting(gathered.held_out, tokenizer, config)
    left_out = len(gathered.training) + len(gathered.held_out) - len(training) - len(held_out)
    if left_out:
        progress.say(
            f"  {left_out:,} prompts are left out: they have more than {config.context_length - config.max_tokens:,} tokens, "
            "context_length without max_tokens"
        )
    if not training:
        raise SourceError("no prompt is left to train on; raise context_length, or lower validation_share")
    judge = Judge(config.rewards, RewardContext(folder, gathered.tasks, reward_model))
    if config.steps is None:
        rollouts = math.ceil(config.epochs * len(training) / config.groups)
        config = config.with_changes(steps=rollouts * config.updates)

    def again(config: RLConfig, out: Path) -> object:
        return rl(config, model, out, seed=seed, device=device, folder=folder, card_flops=card_flops, reward_model=reward_model)

    config, runtime, mesh = prepare_run(
        config,
        model,
        out,
        device=device,
        progress=progress,
        folder=folder,
        plan=Plan(seconds_per_step=partial(seconds_per_step, again, cycle=config.updates)),
        only_resolve=only_resolve,
    )
    if mesh.layout.pipeline > 1:
        raise ConfigError(
            f"parallel: pipeline {mesh.layout.pipeline}: each rank trains some layers, and sampling needs all; take tensor or "
            "data_shard"
        )
    rl_seed = derive_seed(seed, "rl")
    sampler = None
    if config.environment is not None:
        if not mesh.alone:
            raise ConfigError(f"environment: episodes are played in one process, and {mesh.layout.world_size} were started")
        sampler = EpisodeSampler(judge, tokenizer, config, rl_seed, load_environment(config.environment, folder))
    source = RolloutSource(
        training, judge, tokenizer, config, out, seed=rl_seed, progress=progress, held_out=held_out, sampler=sampler
    )
    options: dict[str, Any] = {}
    if config.critic is not None:
        start = model if config.critic.start == "policy" else reward_model
        options |= _critic(config, config.critic, start, runtime.device, mesh, seed)
        objective = ActorCriticObjective(objective, config.critic)
    if needs_reference(config):
        reference, load_reference = open_beside(model, runtime.device, mesh)
        options["frozen"] = {REFERENCE: reference}
        options.setdefault("load_others", {})[REFERENCE] = load_reference

    def batches(config: RLConfig, mesh: Mesh) -> BatchSource:
        return source

    def prepare(config: RLConfig, decoder: Decoder, mesh: Mesh) -> OnStepEnd:
        validated = validated_steps(config)

        def on_step_end(finished: int, trainer: Trainer) -> dict[str, float]:
            found = source.take_metrics() | {"tokens": source.trained_tokens}
            return found | source.validate() if finished in validated else found

        return on_step_end

    try:
        summary = run_training(
            config,
            model,
            out,
            batches,
            seed=seed,
            device=device,
            progress=progress,
            description="rl",
            folder=folder,
            card_flops=card_flops,
            prepare=prepare,
            tasks=tasks,
            objective=objective,
            **options,
        )
    finally:
        source.close()
    without = {"parameters", "tokens_per_second", "gflops", "mfu"}
    return {
        "prompts": len(training),
        "held_out": len(held_out),
        **{name: value for name, value in summary.items() if name not in without},
    }


def needs_reference(config: RLConfig) -> bool:
    """Whether a second model is held, which the policy is kept near to: with an adapter it is the policy without it."""
    if config.adapter is not None or not config.beta:
        return False
    return config.pair_loss is None or bool(PAIR_LOSSES.find(config.pair_loss).load().needs_reference)


def _critic(config: RLConfig, critic: CriticConfig, folder: Path | None, device: str, mesh: Mesh, seed: int) -> dict[str, Any]:
    """What the training loop is told of the critic. folder: of the model that it starts from."""
    if folder is None:
        raise ConfigError("critic.start: reward_model: no reward model is given to start from")
    factor, matrices = critic.learning_rate_factor, config.matrix_learning_rate
    settings = config.with_changes(
        learning_rate=config.learning_rate * factor, matrix_learning_rate=None if matrices is None else matrices * factor
    )
    if holds_codes(folder):
        raise ConfigError(
            f"critic: all its weights are trained, and {folder} is quantised; take the model that it was made from"
        )
    scorer, load = open_beside(folder, device, mesh, seed_of_head=derive_seed(seed, CRITIC))
    return {"beside": {CRITIC: scorer}, "settings_beside": {CRITIC: settings}, "load_others": {CRITIC: load}}


def _fitting(prompts: list[Prompt] | Any, tokenizer: Tokenizer, config: RLConfig) -> list[Prompt]:
    """The prompts that leave room for a completion."""
    most = config.context_length - config.max_tokens
    return [prompt for prompt in prompts if len(prompt.encoded(tokenizer)) <= most]
