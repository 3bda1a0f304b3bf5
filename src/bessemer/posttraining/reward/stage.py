"""The stage `reward`: a reward model learns from pairs which answer is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.progress import Progress, Silent
from bessemer.core.seeds import derive_seed
from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.posttraining.dataset import prompt_key
from bessemer.posttraining.encoding import Encoded, encode_answer
from bessemer.posttraining.formats import Pair
from bessemer.posttraining.packing import PackedBatches, validation_on
from bessemer.posttraining.pairs import gather_pairs
from bessemer.posttraining.preference.packing import can_share_prompts, pack_pairs
from bessemer.posttraining.reward.assessment import ScoredPair, assess, write_scored_pairs
from bessemer.posttraining.reward.config import RewardConfig
from bessemer.posttraining.reward.objective import RewardObjective
from bessemer.posttraining.reward.report import HELD_OUT
from bessemer.posttraining.reward.reward_model import RewardModel
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.autotune import Plan, prepare_run
from bessemer.training.data.batches import BatchSource
from bessemer.training.run import OnStepEnd, run_training

#: Pairs that are scored between two looks at the progress.
_PAIRS_AT_ONCE = 64


def reward(
    config: RewardConfig,
    model: Path,
    out: Path,
    *,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
    folder: Path = Path(),
    card_flops: Callable[[str], float | None] = lambda name: None,
    made: Mapping[str, Path] | None = None,
    only_resolve: bool = False,
) -> dict[str, Any]:
    """Train a reward model on pairs of answers, from the model of folder `model` with a new scalar head, or from a reward
    model; resumes from `out`. With an adapter the head is trained whole beside it.

    Writes below `out`: `model/`, `metrics.jsonl`, `autotune.json`, `checkpoints/`, and `held_out.jsonl`, the rewards of the
    pairs held out. Files named in the settings are relative to `folder`. made: files of stages above, by their names in `data`.

    only_resolve: measure, and raise SettingsResolvedError with the settings. Returns the headline metrics. Raises SourceError
    for pairs that are missing or malformed, and what `run_training` raises.
    """
    progress = progress or Silent()
    tokenizer = load_tokenizer(model)
    training, held_out = gather_pairs(config.data, folder, made or {}, config.validation_share, seed)
    shares = can_share_prompts(config, model)
    packed, validation = (
        pack_pairs(some, tokenizer, config.context_length, example=Encoded.scored, shares_prompts=shares)
        for some in (training, held_out)
    )
    for sentence in packed.sentences(f"{len(training):,} pairs"):
        progress.say(sentence)
    if not packed.rows:
        raise SourceError(
            f"none of the {len(training):,} pairs to train on ends within {config.context_length // 2:,} tokens; raise "
            "context_length"
        )
    if config.steps is None:
        config = config.with_changes(steps=config.batch_sizes.steps_for(math.ceil(config.epochs * packed.rows)))
    # held-out pairs are read at each validation, and scored at the end
    plan = Plan(validation.batch.tokens_BT.numel(), validation.batch.tokens_BT.numel())
    config, _, mesh = prepare_run(
        config, model, out, device=device, progress=progress, folder=folder, plan=plan, only_resolve=only_resolve
    )

    def batches(config: RewardConfig, mesh: Mesh) -> BatchSource:
        return PackedBatches(packed.batch, batch_size=config.batch_size, seed=derive_seed(seed, "batches"))

    def prepare(config: RewardConfig, decoder: Decoder, mesh: Mesh) -> OnStepEnd:
        return validation_on(validation.batch, config)

    summary = run_training(
        config,
        model,
        out,
        batches,
        seed=seed,
        device=device,
        progress=progress,
        description="reward model",
        folder=folder,
        card_flops=card_flops,
        prepare=prepare,
        objective=RewardObjective(config.centering),
    )
    assessed: dict[str, Any] = {}
    if mesh.leads and validation.pairs:
        scored = score_pairs(
            RewardModel.open(out / "model", device=device), held_out, config.context_length // 2, progress=progress
        )
        write_scored_pairs(out / HELD_OUT, scored)
        assessed = assess(scored)
    return {
        "pairs": packed.pairs,
        "held_out": validation.pairs,
        **packed.figures,
        "rows": packed.rows,
        **assessed,
        **{name: value for name, value in summary.items() if name != "parameters"},
    }


def score_pairs(
    model: RewardModel, pairs: Sequence[Pair], longest: int, *, progress: Progress | None = None
) -> list[ScoredPair]:
    """Pairs with the rewards of both answers; those with an answer that does not end within `longest` tokens are left out."""
    scored: list[ScoredPair] = []
    with (progress or Silent()).task("score held-out pairs", total=len(pairs), unit="pairs") as bar:
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            some = pairs[start : start + _PAIRS_AT_ONCE]
            sides = [
                [encode_answer(pair.prompt, answer, model.tokenizer, pair.tools) for answer in (pair.chosen, pair.rejected)]
                for pair in some
            ]
            fitting = [number for number, both in enumerate(sides) if all(one.scored(longest) is not None for one in both)]
            rewards = iter(model.score_tokens([one.through_end() for number in fitting for one in sides[number]]))
            for number in fitting:
                chosen, rejected = next(rewards), next(rewards)
                lengths = (int(one.is_learnt.sum()) for one in sides[number])
                scored.append(ScoredPair(prompt_key(some[number].prompt), chosen, rejected, *lengths))
            bar.advance(len(some))
    return scored
