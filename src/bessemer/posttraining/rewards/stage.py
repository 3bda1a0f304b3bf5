"""The stage `reward`: a reward model, a decoder with a scalar head, learns from pairs which answer is better.

Its objective gives the chosen answer of a pair the higher reward.

Shapes: B rows, T tokens of a row, S sequences of a row, P = S / 2 pairs of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bessemer.core.errors import SourceError
from bessemer.core.hashing import derive_seed
from bessemer.core.progress import Progress, Silent
from bessemer.model.decoder import Decoder
from bessemer.posttraining.data.encoding import Encoded, encode_answer
from bessemer.posttraining.data.examples import BAD_ROWS, RowReader, gather_pairs, prompt_key
from bessemer.posttraining.data.formats import Pair
from bessemer.posttraining.data.packing import PackedBatches, can_share_prompts, pack_pairs, validation_on
from bessemer.posttraining.data.template_record import keep_template
from bessemer.posttraining.data.turns import NothingLearntError, RowError
from bessemer.posttraining.rewards.assessment import HELD_OUT, ScoredPair, assess, write_scored_pairs
from bessemer.posttraining.rewards.config import RewardConfig
from bessemer.posttraining.rewards.model_based import RewardModel
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.autotune import RunCost
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.job import RunContext, RunOptions, TrainingHooks, TrainingJob
from bessemer.training.objectives import Count, LossContext, Metric, Objective, Terms


def ranking_loss(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor, confidence_P: Tensor | None = None) -> Tensor:
    """−log σ(r_w − r_l − m): the negative log-likelihood of Bradley and Terry's model (1952), with the margins of Touvron et
    al. (2023, Llama 2, eq. 2).

    With confidence c the cross-entropy with a label that is only probable:
    −c log σ(r_w − r_l − m) − (1 − c) log σ(r_l − r_w − m).
    """
    loss_P = -logsigmoid(chosen_P - rejected_P - margin_P)
    if confidence_P is None:
        return loss_P
    return confidence_P * loss_P - (1 - confidence_P) * logsigmoid(rejected_P - chosen_P - margin_P)


def centering_loss(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """(r_w + r_l)², which fixes where rewards lie (Eisenstein et al. 2023): the ranking sees their difference alone."""
    return (chosen_P + rejected_P).square()


def rewards(model: Decoder, batch: Batch) -> Tensor:
    """The score at the end token of each sequence, (B, S), 0 where its end is on another rank. The end token is the sequence's
    only target."""
    hidden_BTD = model.hidden(**batch.inputs)
    scores_BT = model.scores(hidden_BTD)[..., 0]
    # not by multiplying: scores at padding may not be finite
    return batch.sequence_sums(scores_BT.where(batch.targets_BT != IGNORE_INDEX, 0))


class RewardObjective(Objective):
    """Mean of the ranking loss over pairs, and of the centring loss with its weight.

    Logged: `accuracy`, the share of pairs whose chosen answer has the higher reward; `margin`, the mean difference of rewards;
    `reward_chosen`, `reward_rejected`, their means.
    """

    def __init__(self, centering: float = 0.0) -> None:
        self._centering = centering

    def denominators(self, batch: Batch) -> dict[str, Count]:
        """The sum of the weights of pairs, for every term."""
        pairs = Count(float(batch.per_sequence["pair_weight"].sum()) / 2, "sequence")
        return {"ranking": pairs, **({"centering": pairs} if self._centering else {})}

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        rewards_BS = context.sum_over_context(rewards(model, batch))
        chosen_BP, rejected_BP = rewards_BS[:, 0::2], rewards_BS[:, 1::2]
        weight_BP, margin_BP = (batch.per_sequence[name][:, 0::2].to(rewards_BS.dtype) for name in ("pair_weight", "margin"))
        confidence_BS = batch.per_sequence.get("confidence")
        confidence_BP = None if confidence_BS is None else confidence_BS[:, 0::2].to(rewards_BS.dtype)
        losses_BP = ranking_loss(chosen_BP, rejected_BP, margin_BP, confidence_BP)
        sums = {"ranking": context.once((losses_BP * weight_BP).sum())}
        if self._centering:
            centered_BP = self._centering * centering_loss(chosen_BP, rejected_BP)
            sums["centering"] = context.once((centered_BP * weight_BP).sum())
        with torch.no_grad():
            figures_BP = {
                "accuracy": (chosen_BP > rejected_BP).to(rewards_BS.dtype),
                "margin": chosen_BP - rejected_BP,
                "reward_chosen": chosen_BP,
                "reward_rejected": rejected_BP,
            }
            pairs = context.once(weight_BP.sum())
            metrics = {name: Metric(context.once((one * weight_BP).sum()), pairs) for name, one in figures_BP.items()}
        return Terms(sums, metrics)


#: Pairs that are scored at a time.
_PAIRS_AT_ONCE = 64


def reward(
    config: RewardConfig,
    model: Path,
    out: Path,
    *,
    made: Mapping[str, Path] | None = None,
    only_resolve: bool = False,
    **options: Unpack[RunOptions],
) -> dict[str, Any]:
    """Train a reward model on pairs of answers, from the model of folder `model` with a new scalar head, or from a reward
    model; resumes from `out`. With an adapter the head is trained whole beside it.

    Writes below `out`: `model/`, `metrics.jsonl`, `autotune.json`, `checkpoints/`, and `held_out.jsonl`, the rewards of the
    pairs held out. Files named in the settings are relative to `folder`. made: files of stages above, by their names in `data`.

    only_resolve: measure, and raise SettingsResolvedError with the settings. Returns the headline metrics. Raises SourceError
    for pairs that are missing or malformed, and what `TrainingJob` raises.
    """
    run = RunContext(out, **options)
    tokenizer = load_tokenizer(model)
    reader = RowReader(config.on_bad_row, run.progress.say)
    training, held_out = gather_pairs(config.data, run.folder, made or {}, config.validation_share, run.seed, reader)
    shares = can_share_prompts(config, model)
    packed, validation = (
        pack_pairs(some, tokenizer, config.context_length, example=Encoded.scored, shares_prompts=shares)
        for some in (training, held_out)
    )
    for sentence in packed.sentences(f"{len(training):,} pairs"):
        run.progress.say(sentence)
    if not packed.rows:
        raise SourceError(
            f"none of the {len(training):,} pairs to train on ends within {config.context_length // 2:,} tokens; raise "
            "context_length"
        )
    if config.steps is None:
        config = config.with_changes(steps=config.batch_sizes.steps_for(math.ceil(config.epochs * packed.rows)))
    # held-out pairs are read at each validation, and scored at the end
    cost = RunCost(validation.batch.tokens_BT.numel(), validation.batch.tokens_BT.numel())
    job = TrainingJob.open(config, model, run, description="reward model", cost=cost, only_resolve=only_resolve)
    config = job.config
    if job.mesh.leads:
        reader.write_bad_rows(out / BAD_ROWS)
    summary = job.train(
        PackedBatches(packed.batch, batch_size=config.batch_size, seed=derive_seed(run.seed, "batches")),
        objective=RewardObjective(config.centering),
        hooks=TrainingHooks(lambda decoder: validation_on(validation.batch, config)),
    )
    if job.mesh.leads:
        keep_template(out, tokenizer)
    assessed: dict[str, Any] = {}
    if job.mesh.leads and validation.pairs:
        trained = RewardModel.open(out / "model", device=run.device)
        scored = score_pairs(trained, held_out, config.context_length // 2, progress=run.progress)
        write_scored_pairs(out / HELD_OUT, scored)
        assessed = assess(scored)
    return {
        "pairs": packed.pairs,
        "held_out": validation.pairs,
        **reader.figures,
        **packed.figures,
        "rows": packed.rows,
        **assessed,
        **{name: value for name, value in summary.items() if name != "parameters"},
    }


def _sides(pair: Pair, tokenizer: Tokenizer) -> list[Encoded]:
    """Both answers of a pair; none where the model's template cannot write one, or nothing is said in it."""
    try:
        return [encode_answer(pair.prompt, answer, tokenizer, pair.tools) for answer in (pair.chosen, pair.rejected)]
    except (RowError, NothingLearntError):
        return []


def score_pairs(
    model: RewardModel, pairs: Sequence[Pair], longest: int, *, progress: Progress | None = None
) -> list[ScoredPair]:
    """Pairs with the rewards of both answers; those with an answer that does not end within `longest` tokens are left out."""
    scored: list[ScoredPair] = []
    with (progress or Silent()).task("score held-out pairs", total=len(pairs), unit="pairs") as bar:
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            some = pairs[start : start + _PAIRS_AT_ONCE]
            sides = [_sides(pair, model.tokenizer) for pair in some]
            fitting = [
                number for number, both in enumerate(sides) if both and all(one.scored(longest) is not None for one in both)
            ]
            rewards = iter(model.score_tokens([one.through_end() for number in fitting for one in sides[number]]))
            for number in fitting:
                chosen, rejected = next(rewards), next(rewards)
                lengths = (int(one.is_learnt.sum()) for one in sides[number])
                scored.append(ScoredPair(prompt_key(some[number].prompt), chosen, rejected, *lengths))
            bar.advance(len(some))
    return scored
