"""The stage `rl`: a policy learns from rewards of what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.progress import Progress, Silent
from bessemer.core.seeds import derive_seed
from bessemer.core.stage import OpenTasks
from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.model.folder import load_model
from bessemer.posttraining.rewards.judge import Judge
from bessemer.posttraining.rewards.registry import RewardContext
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.objective import PolicyObjective
from bessemer.posttraining.rl.prompts import Prompt, gather_prompts
from bessemer.posttraining.rl.rollouts import RolloutBatches
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.autotune import prepare_run
from bessemer.training.data.batches import BatchSource
from bessemer.training.run import OnStepEnd, run_training, validated_steps
from bessemer.training.trainee import REFERENCE
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
) -> dict[str, Any]:
    """Train the model of folder `model` by the rewards of its completions; resumes from `out`.

    Writes below `out`: `model/`, `metrics.jsonl`, `completions.jsonl` (every completion with its rewards), `autotune.json`,
    `checkpoints/`. Files that the settings name are relative to `folder`. Returns the headline metrics. Raises SourceError for
    prompts that are missing or malformed, ConfigError for rewards that cannot be given and for several processes, RewardError
    where no completion has a reward, CollapseError for a policy beyond its limits, and what `run_training` raises.
    """
    progress = progress or Silent()
    tokenizer = load_tokenizer(model)
    objective = PolicyObjective.of(config)
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
    judge = Judge(config.rewards, RewardContext(folder, gathered.tasks))
    if config.steps is None:
        rollouts = math.ceil(config.epochs * len(training) / config.groups)
        config = config.with_changes(steps=rollouts * config.updates)
    config, runtime, mesh = prepare_run(config, model, out, device=device, progress=progress, folder=folder)
    if not mesh.alone:
        raise ConfigError(f"rl samples in one process, and {mesh.layout.world_size} were started; start it in one")
    source = RolloutBatches(
        training, judge, tokenizer, config, out, seed=derive_seed(seed, "rl"), progress=progress, held_out=held_out
    )
    options: dict[str, Any] = {}
    if config.beta:
        options["frozen"] = {REFERENCE: load_model(model, device=runtime.device, dtype=torch.float32)}

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


def _fitting(prompts: list[Prompt] | Any, tokenizer: Tokenizer, config: RLConfig) -> list[Prompt]:
    """The prompts that leave room for a completion."""
    most = config.context_length - config.max_tokens
    return [prompt for prompt in prompts if len(prompt.encoded(tokenizer)) <= most]
