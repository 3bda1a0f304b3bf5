"""The stage `rl`: a policy learns from rewards of what it writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import torch.distributed as dist

from bessemer.core.errors import ConfigError, RequestError, SourceError
from bessemer.core.hashing import derive_seed
from bessemer.core.records import TABLES
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device, is_fast
from bessemer.model.storage.model_config import holds_codes
from bessemer.model.vision.folder import read_vision_language
from bessemer.posttraining.data.examples import BAD_ROWS, RowReader, folder_of, read_examples
from bessemer.posttraining.data.formats import Turns, about_pictures, messages_of
from bessemer.posttraining.data.made import data_path, is_data_name
from bessemer.posttraining.data.picture_encoding import PICTURES, PictureEncoder, open_picture_encoder
from bessemer.posttraining.data.picture_rows import has_pictures, pictures_of
from bessemer.posttraining.data.splitting import opening, split_examples
from bessemer.posttraining.data.template_record import keep_template
from bessemer.posttraining.picture_memory import memory_line, pictures_of_prompts, step_memory
from bessemer.posttraining.preference.config import PAIR_LOSSES
from bessemer.posttraining.rewards.config import RewardContext, RewardTask
from bessemer.posttraining.rewards.judge import Judge
from bessemer.posttraining.rl.batches import pair_objective
from bessemer.posttraining.rl.config import CriticConfig, RLConfig
from bessemer.posttraining.rl.critic import CRITIC, ActorCriticObjective
from bessemer.posttraining.rl.environments.registry import OWN_TASKS, Environments, load_environments
from bessemer.posttraining.rl.objective import PolicyObjective
from bessemer.posttraining.rl.policy_sampler import EpisodeSampler, PolicySampler
from bessemer.posttraining.rl.rollouts import RolloutSource
from bessemer.posttraining.rl.served_rollouts import ServedRolloutSource
from bessemer.posttraining.sampling.samples import Prompt, fitting_prompts
from bessemer.posttraining.sampling.served_policy import ServedPolicy
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.questions import GenerationTask
from bessemer.tasks.registry import TASKS, find_tasks, placed_task
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.autotune import RunCost, seconds_per_step
from bessemer.training.job import RunContext, RunOptions, TrainingHooks, TrainingJob
from bessemer.training.keeping import HeldOut
from bessemer.training.loop import OnStepEnd
from bessemer.training.model_roles import REFERENCE, OtherModel
from bessemer.training.objectives import Objective
from bessemer.training.trainer import Trainer


def settings_on(config: RLConfig, device: torch.device) -> RLConfig:
    """The settings with what hangs on the device and is not given: on a GPU bfloat16, where it multiplies in it, and a cache
    whose memory is free while training."""
    if device.type != "cuda" or config.bitwise_consistent:
        return config
    changes: dict[str, Any] = {} if "sleep" in config.model_fields_set else {"sleep": True}
    if "dtype" not in config.model_fields_set and is_fast(torch.bfloat16, device):
        changes["dtype"] = "bfloat16"
    return config.with_changes(**changes) if changes else config


def rl(
    config: RLConfig,
    model: Path,
    out: Path,
    *,
    reward_model: Path | None = None,
    only_resolve: bool = False,
    **options: Unpack[RunOptions],
) -> dict[str, Any]:
    """Train the model of folder `model` by the rewards of its completions; resumes from `out`.

    Writes below `out`: `model/`, with an adapter `adapter/`, `metrics.jsonl`, `completions.jsonl` (every completion with its
    rewards), `autotune.json`, `checkpoints/`. With an adapter the reference is the policy without it. Files that the settings
    name are relative to `folder`. reward_model: the folder of the one that judges, or that a critic starts from, where the
    settings say so. only_resolve: measure, and raise SettingsResolvedError with the settings. Returns the headline metrics.
    Raises SourceError for prompts that are missing or malformed, ConfigError for rewards that cannot be given and for a
    pipeline, RewardError where no completion has a reward, CollapseError for a policy beyond its limits, MismatchError where
    sampler and trainer must agree and do not, and what `TrainingJob` raises.
    """
    run = RunContext(out, **options)
    config = settings_on(config, choose_device(run.device))
    tokenizer = load_tokenizer(model)
    objective: Objective = PolicyObjective.of(config) if config.pair_loss is None else pair_objective(config)
    environments = None
    if config.environment is not None:
        environments = load_environments(config.environment, run.folder, config.environment_options, config.max_turns)
    reader = RowReader(config.on_bad_row, run.progress.say)
    gathered = gather_prompts(config, run.folder, run.seed, reader, environments)
    pictures = open_picture_encoder(model, tokenizer, out / PICTURES)
    training = _fitting(gathered.training, tokenizer, config, pictures)
    held_out = _fitting(gathered.held_out, tokenizer, config, pictures)
    if pictures is not None and not pictures.file.is_empty:
        _check_pictures(config)
    left_out = len(gathered.training) + len(gathered.held_out) - len(training) - len(held_out)
    if left_out:
        run.progress.say(
            f"  {left_out:,} prompts are left out: they have more than {config.context_length - config.max_tokens:,} tokens, "
            "context_length without max_tokens, or the model's chat template refuses them, or a picture cannot be read"
        )
    if not training:
        raise SourceError("no prompt is left to train on; raise context_length, or lower validation_share")
    judge = Judge(config.rewards, RewardContext(run.folder, gathered.tasks, reward_model))
    if config.steps is None:
        rollouts = math.ceil(config.epochs * len(training) / config.groups)
        config = config.with_changes(steps=rollouts * config.updates)

    if pictures is not None and not pictures.file.is_empty and not dist.is_initialized():
        shown = [prompt.pictures.vectors for prompt in training if prompt.pictures is not None]
        run.progress.say(_memory_line(config, model, pictures, shown, run.device))

    def trial(config: RLConfig, out: Path) -> object:
        return rl(config, model, out, reward_model=reward_model, **run.trial_options)

    cost = RunCost(seconds_per_step=partial(seconds_per_step, trial, cycle=config.updates))
    job = TrainingJob.open(config, model, run, description="rl", cost=cost, only_resolve=only_resolve)
    config, mesh = job.config, job.mesh
    if mesh.leads:
        reader.write_bad_rows(out / BAD_ROWS)
    if mesh.layout.pipeline > 1:
        raise ConfigError(
            f"parallel: pipeline {mesh.layout.pipeline}: each rank trains some layers, and sampling needs all; take tensor or "
            "data_shard"
        )
    rl_seed = derive_seed(run.seed, "rl")
    servers = _servers(config, tokenizer, model, run)
    sampler = PolicySampler(judge, tokenizer, config, rl_seed, servers)
    if environments is not None:
        if not mesh.alone and servers is None:
            raise ConfigError(
                f"environment: episodes are played in one process, and {mesh.layout.world_size} were started; with rollouts, "
                "servers sample for all"
            )
        sampler = EpisodeSampler(judge, tokenizer, config, rl_seed, environments.new, servers)
    kind = RolloutSource if servers is None else ServedRolloutSource
    source = kind(sampler, training, out, run.progress, held_out)
    others = []
    if config.critic is not None:
        others.append(_critic(job, config.critic, model if config.critic.start == "policy" else reward_model))
        objective = ActorCriticObjective(objective, config.critic)
    if needs_reference(config):
        others.append(job.other(REFERENCE, model))
    validated = config.validated_steps

    def on_step_end(finished: int, trainer: Trainer) -> dict[str, float]:
        metrics = source.take_metrics() | {"tokens": source.trained_tokens}
        return metrics | source.validate() if finished in validated else metrics

    def begin(decoder: Decoder) -> OnStepEnd:
        if config.bitwise_consistent:
            decoder.use_batch_invariant_kernels()
        return on_step_end

    rewards = HeldOut("held-out reward", source.held_out_rewards) if held_out else None
    try:
        hooks = TrainingHooks(begin, held_out=rewards)
        summary = job.train(source, objective=objective, others=others, hooks=hooks)
        source.finish()
    finally:
        source.close()
        if pictures is not None:
            pictures.file.close()
    if mesh.leads:
        keep_template(out, tokenizer)
    without = {"parameters", "tokens_per_second", "gflops", "mfu"}
    return {
        "prompts": len(training),
        "held_out": len(held_out),
        **reader.figures,
        **{name: value for name, value in summary.items() if name not in without},
    }


def _memory_line(config: RLConfig, model: Path, pictures: PictureEncoder, shown: Sequence[np.ndarray], device: str) -> str:
    """The memory of a step on a mini-batch, whose completions are as long as a row; shown: of each prompt with pictures, the
    vectors of its tokens."""
    vision = read_vision_language(model)
    rows = min(config.micro_batch_size or config.batch_size, config.batch_size)
    prompts = -(-rows // config.group_size)
    of_step = pictures_of_prompts(pictures.file.table(), shown, prompts, min(rows, config.group_size), vision)
    beside = int(needs_reference(config))
    return memory_line(step_memory(config, vision, of_step, choose_device(device).type, models_beside=beside))


def _check_pictures(config: RLConfig) -> None:
    """Raise ConfigError for settings with which prompts have no pictures."""
    for name, is_set, why in (
        ("rollouts", config.rollouts is not None, "servers are sent texts alone"),
        ("environment", config.environment is not None, "its turns are texts alone"),
        ("critic", config.critic is not None, "a critic judges texts alone; take an advantage of groups"),
        ("bitwise_consistent", config.bitwise_consistent, "an encoder of pictures has no batch-invariant kernels"),
    ):
        if is_set:
            raise ConfigError(f"{name}: prompts have pictures, and {why}; leave it out")


def _servers(config: RLConfig, tokenizer: Tokenizer, model: Path, run: RunContext) -> ServedPolicy | None:
    """The servers that the settings name."""
    settings = config.rollouts
    if settings is None:
        return None
    folder = run.out / "served" if settings.folder is None else run.folder / settings.folder
    return ServedPolicy(
        settings, tokenizer, model, folder, run.progress.say, temperature=config.temperature, longest=config.context_length
    )


def needs_reference(config: RLConfig) -> bool:
    """Whether a second model is held, which the policy is kept near to: with an adapter it is the policy without it."""
    if config.adapter is not None or not config.beta:
        return False
    return config.pair_loss is None or bool(PAIR_LOSSES.find(config.pair_loss).load().needs_reference)


def _critic(job: TrainingJob[RLConfig], critic: CriticConfig, folder: Path | None) -> OtherModel:
    """The critic, which starts from the model of a folder."""
    config = job.config
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
    return job.other(CRITIC, folder, trained=True, settings=settings, seed_of_head=derive_seed(job.run.seed, CRITIC))


def _fitting(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, config: RLConfig, pictures: PictureEncoder | None
) -> list[Prompt]:
    """The prompts that leave room for a completion."""
    most = config.context_length - config.max_tokens
    return [prompt for prompt, _ in fitting_prompts(prompts, tokenizer, most, pictures)]


@dataclass(frozen=True)
class Prompts:
    """Prompts to train on and held-out ones, and by name the tasks from which some of them come."""

    training: Sequence[Prompt]
    held_out: Sequence[Prompt]
    tasks: Mapping[str, RewardTask]


def gather_prompts(
    config: RLConfig,
    folder: Path,
    seed: int,
    reader: RowReader | None = None,
    environments: Environments | None = None,
) -> Prompts:
    """The prompts of all data that the settings name, each once, in order.

    environments: that may have tasks of their own. Raises SourceError for rows that are malformed, ConfigError for a task that
    there is not or that generates nothing, ArtefactError for a task's data.
    """
    reader = reader or RowReader(config.on_bad_row)
    prompts: list[Prompt] = []
    tasks: dict[str, RewardTask] = {}
    for name in config.data:
        if name == OWN_TASKS:
            prompts += _own_tasks(config, environments)
            continue
        if is_data_name(name):
            place = data_path(name, folder, {})
            rows = read_examples(place, partial(_prompt, config), reader)
            prompts += [replace(prompt, folder=folder_of(place)) for prompt in rows]
            continue
        task = _task(name, config, folder)
        if task.name in tasks:
            raise ConfigError(f"data: two tasks have the name {task.name!r}; name each once")
        questions = list(task.questions())
        tasks[task.name] = RewardTask(task, {question.item: question for question in questions})
        for question in questions:
            turns: Turns = question.context if isinstance(question.context, str) else tuple(map(dict, question.context))
            columns = {"task": task.name, "item": question.item}
            prompts.append(Prompt(turns, columns, task.generation.stop, task.begin_token))
    training, held_out = split_examples(prompts, _whole, config.validation_share, seed)
    return Prompts(training, held_out, tasks)


def _own_tasks(config: RLConfig, environments: Environments | None) -> list[Prompt]:
    if environments is None or environments.tasks is None:
        raise ConfigError(f"data: {OWN_TASKS}: the environment has no tasks of its own; name a file of rows")
    try:
        # the names of columns are the source's, whatever the setting for files says
        own = config.with_changes(prompt_column="prompt")
        return [_prompt(own, row) for row in environments.tasks]
    except (ValueError, RequestError) as error:
        raise SourceError(f"data: {OWN_TASKS}: {error}") from None


def _task(name: str, config: RLConfig, folder: Path) -> GenerationTask:
    is_file = name.endswith((".yaml", ".yml"))
    data = None if config.tasks_folder is None else folder / config.tasks_folder
    if not is_file and name not in TASKS:
        raise ConfigError(f"data: {name!r} is neither a file of {', '.join(TABLES)} nor a task; there are {', '.join(TASKS)}")
    options = TaskOptions(data=data, chat=config.chat or None, system=config.system)
    (task,) = find_tasks([placed_task(name, folder)], options)
    if not isinstance(task, GenerationTask):
        raise ConfigError(f"data: the task {task.name} is asked by likelihood; rl needs one whose answers are generated")
    return task


def _prompt(config: RLConfig, row: Mapping[str, Any]) -> Prompt:
    """A row's prompt. Raises ValueError or RequestError, in one line."""
    given, pictures = row.get(config.prompt_column), pictures_of(row)
    columns = {name: value for name, value in row.items() if name != config.prompt_column}
    if isinstance(given, str) and given.strip():
        if not config.chat and not pictures:
            return Prompt(given, columns)
        given = [{"role": "user", "content": given}]
    elif not isinstance(given, list) or not given:
        raise ValueError(f"needs messages or a text under {config.prompt_column!r}; it has {given!r}"[:200])
    messages = list(messages_of(given, config.prompt_column))
    if config.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system}, *messages]
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{config.prompt_column}: the prompt ends with the assistant, whose turn it is to answer")
    turns, _ = about_pictures(tuple(messages), (), pictures)
    return Prompt(turns, columns)


def _whole(prompt: Prompt) -> str:
    """All of a prompt, and not its opening: that may be an example which every question of a task has before it. Of one with
    pictures these, whatever is asked about them."""
    if isinstance(prompt.turns, str):
        return prompt.turns
    if has_pictures(prompt.turns):
        return opening(prompt.turns)
    return "\n".join(str(one.get("content") or "") for one in prompt.turns)
