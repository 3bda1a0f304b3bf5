"""A red team's run from settings to its folder: for the command, and for the stage `redteam`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bessemer.core.chat_client import ChatModel
from bessemer.core.policy import default_policy_path, read_policy
from bessemer.core.progress import Progress, Silent
from bessemer.core.stage import StageContext
from bessemer.core.store import write_json, write_text
from bessemer.safety.redteam.campaign import ATTEMPTS_FILE, Campaign, Journal, attempts_of, run_identity
from bessemer.safety.redteam.config import RedTeamConfig
from bessemer.safety.redteam.goals import Goal, chosen_goals, goals_of
from bessemer.safety.redteam.results import RESULTS_FILE, summarise
from bessemer.safety.redteam.targets import EngineTarget, Target, plain_weights
from bessemer.tasks.judged import JudgeConfig

#: Queries by which the stage is timed, and the share of its time that this may take.
_TRIAL_QUERIES = 8
#: Fewest queries of a stage that `minutes` limits.
_FEWEST_QUERIES = 8


def goals_for(config: RedTeamConfig, folder: Path) -> list[Goal]:
    """The goals that settings choose; paths start from `folder`. Raises ConfigError as `goals_of` and `chosen_goals`, and where
    no goal is left."""
    policy = read_policy(None if config.policy is None else folder / config.policy)
    goals = goals_of(policy, [folder / path for path in config.seeds], own_seeds=config.own_seeds)
    return chosen_goals(goals, config.categories, config.limit)


def attack_model(
    config: RedTeamConfig,
    target: Target,
    out: Path,
    *,
    model: Mapping[str, Any],
    seed: int = 0,
    folder: Path = Path(),
    device: str = "auto",
    has_weights: bool = False,
    journal: Path | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Attack a target and write `queries.jsonl`, `attempts.jsonl` and `results.json` below `out`; goes on with what is there.

    model: what identifies the target, as plain values. folder: where paths of the settings start. has_weights: whether
    `target.white_box` opens the model. journal: a folder for `queries.jsonl` other than `out`. Returns what `results.json`
    holds. Raises ConfigError for goals, a policy, an attacker and a judge that are none, and where the folder holds another
    run; ApiError where the target fails for good.
    """
    progress = progress or Silent()
    goals = goals_for(config, folder)
    attempts, notes = attempts_of(config, goals, has_weights=has_weights)
    for note in notes:
        progress.say(f"  {note}")
    campaign = Campaign(
        config,
        goals,
        target,
        Journal(journal or out, run_identity(config, goals, model, seed)),
        seed,
        progress,
        _opened(config.attacker, folder, device),
        _opened(config.judge, folder, device),
    )
    finished = campaign.run(attempts, stop)
    lines = [one.as_line() for one in finished]
    write_text(out / ATTEMPTS_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    results = summarise(finished, planned=len(attempts), notes=notes)
    write_json(out / RESULTS_FILE, results)
    return results


def _opened(config: JudgeConfig | None, folder: Path, device: str) -> ChatModel | None:
    if config is None:
        return None
    from bessemer.inference.chat import open_chat

    return open_chat(config, folder, device, temperature=getattr(config, "temperature", 0.0))


# ------------------------------------------------------------------------------------------------------------------ the stage


def redteam_stage(context: StageContext) -> dict[str, Any]:
    """The stage `redteam`: the results are its metrics."""
    from bessemer.inference.engine import Engine

    config: RedTeamConfig = context.config
    place = context.inputs["model"]
    with Engine(place, device=context.device) as engine:
        target = EngineTarget(
            engine,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            open_weights=lambda: plain_weights(place, context.device),
        )
        return attack_model(
            config,
            target,
            context.out,
            model={"stage": "redteam"},
            seed=context.seed,
            folder=context.folder,
            device=context.device,
            has_weights=True,
            # what an interrupted stage keeps
            journal=context.out / "checkpoints",
            progress=context.progress,
        )


def within_minutes(context: StageContext) -> tuple[RedTeamConfig, dict[str, Any]]:
    """The settings with as many queries as fit `minutes`, and the measurement behind them.

    The first plain requests are answered once to open the model and once to be timed, in a batch, as later ones are.
    """
    config: RedTeamConfig = context.config
    assert config.minutes is not None
    started = time.perf_counter()
    trial = config.with_changes(minutes=None, budget=_TRIAL_QUERIES, attacks=["direct"], attack_settings={})
    seconds = []
    with context.progress.task("measure this machine"):
        for number in range(2):
            with TemporaryDirectory() as scratch:
                begin = time.perf_counter()
                out = Path(scratch) / str(number)
                redteam_stage(replace(context, config=trial, out=out, progress=Silent()))
                seconds.append(time.perf_counter() - begin)
    # the second time holds opening the model again, so that the estimate is on the safe side
    each = seconds[1] / _TRIAL_QUERIES
    left = 60 * config.minutes - (time.perf_counter() - started)
    budget = max(_FEWEST_QUERIES, int(left / each))
    measured = {"minutes": config.minutes, "seconds": round(time.perf_counter() - started, 1), "queries": budget}
    return config.with_changes(minutes=None, budget=budget), measured


def policy_and_seeds(config: RedTeamConfig, folder: Path) -> list[Path]:
    """The files that a stage's output depends on beside its settings."""
    policy = default_policy_path() if config.policy is None else folder / config.policy
    return [policy, *(folder / path for path in config.seeds)]
