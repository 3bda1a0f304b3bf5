"""From a budget to a run: model, tokens, batch and learning rate, the predicted loss, the layout, a recipe.

`predict_loss` gives the loss that a law predicts for a run that has not been trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig
from bessemer.scaling.hardware import Card
from bessemer.scaling.job import PlannedJob
from bessemer.scaling.ladder import DECAY_FRACTION, LadderSettings, counted, ladder_settings, shape_for, shape_settings
from bessemer.scaling.laws.fit import Count, Fit, Interval, quantity_interval
from bessemer.scaling.laws.parametric import BESIROGLU, FLOPS_PER_PARAMETER_TOKEN, ParametricLaw
from bessemer.scaling.planner import Plan, plans
from bessemer.training.config import LoopConfig
from bessemer.training.pretrain_config import PretrainConfig

_SECONDS_PER_DAY = 86_400
#: Iterations of the fixed point between FLOPs and the speed of the model of that size.
_ROUNDS = 6
_CLOSE = 0.01
#: Fewest optimizer steps of a suggested run. A budget for fewer is refused as too small for the ladder's rules.
_FEWEST_STEPS = 10
#: Lower triangle whose square is the covariance of (log E, log A, log B, α, β) of `BESIROGLU`: of 400 samples, with
#: replacement, of the points that the authors published (github.com/epoch-research/analyzing-chinchilla, without the five of
#: the fewest tokens a parameter), each fitted by `laws.huber`. Standard errors 0.025, 118, 1210, 0.015, 0.020; the paper has
#: 0.03, 125, 1293, 0.02, 0.02.
_COVARIANCE_ROOT = (
    (0.013727, 0, 0, 0, 0),
    (0.14788, 0.20415, 0, 0, 0),
    (0.24103, -0.3054, 0.10388, 0, 0),
    (0.0087538, 0.012246, -0.00026569, 0.00046682, 0),
    (0.011745, -0.015093, 0.0048249, -0.00039102, 0.00015021),
)
#: Smallest and largest compute of these points.
_BESIROGLU_FLOPS = (1.4e18, 1.3e22)
#: Settings of a base recipe that would contradict or rescale those of a suggestion.
_REPLACED = ("steps", "minutes", "matrix_learning_rate", "warmup_steps", "decay_steps", "decay_tokens", "mup_base_width")


@dataclass(frozen=True)
class LawInUse:
    """The law that a suggestion follows, what it was fitted to, and the smallest and largest compute of its points."""

    law: ParametricLaw
    said: str
    count: Count
    metric: str
    flops: tuple[float, float]
    fit: Fit | None = None

    def interval(self, parameters: float, tokens: float, confidence: float) -> Interval:
        """Interval of the loss at N and D: of one further run where the law has its points, else of the law alone."""
        if self.fit is not None:
            return self.fit.new_run_interval(parameters, tokens, confidence)
        return quantity_interval(published_resamples(), lambda law: float(law.predict(parameters, tokens)), confidence)


def published_law() -> LawInUse:
    """Besiroglu et al.'s numbers: other data, another tokenizer, another architecture than the run that is planned."""
    said = (
        "published: Besiroglu et al. 2024 (2404.10102), on MassiveText with Chinchilla's tokenizer, in nats a token; of your "
        "data and model it knows nothing, and --law takes a fit to your own runs"
    )
    return LawInUse(BESIROGLU, said, "all", "nats a token", _BESIROGLU_FLOPS)


def fitted_law(fit: Fit, name: str) -> LawInUse:
    """A fit to one's own points."""
    said = f"{name}: {fit.method} fit to {len(fit.points)} points, N counted as {fit.count}"
    return LawInUse(fit.law, said, fit.count, fit.metric, (float(fit.points.flops.min()), float(fit.points.flops.max())), fit)


def published_resamples(count: int = 400) -> list[ParametricLaw]:
    """Laws drawn from the uncertainty of `BESIROGLU`."""
    centre = np.array([np.log(BESIROGLU.E), np.log(BESIROGLU.A), np.log(BESIROGLU.B), BESIROGLU.alpha, BESIROGLU.beta])
    drawn = centre + np.random.default_rng(0).standard_normal((count, 5)) @ np.array(_COVARIANCE_ROOT).T
    return [ParametricLaw(*map(float, (*np.exp(row[:3]), *row[3:]))) for row in drawn]


@dataclass(frozen=True)
class Suggestion:
    """A run for a budget. flops: 6 N D of the model as it is counted by the law."""

    law: LawInUse
    model: ModelConfig
    flops: float
    parameters: int
    tokens: int
    settings: PretrainConfig
    loss: float
    interval: Interval
    plan: Plan | None

    @property
    def extrapolation(self) -> str | None:
        """How far the compute lies outside the range of the law's points, in words; None within."""
        smallest, largest = self.law.flops
        if self.flops > largest:
            return f"{self.flops / largest:,.3g} times the compute of the largest point that the law was fitted to"
        if self.flops < smallest:
            return f"1/{smallest / self.flops:,.3g} of the compute of the smallest point that the law was fitted to"
        return None

    def recipe(self, base: str, base_settings: LoopConfig, name: str) -> dict[str, Any]:
        """Plain values of a recipe that trains it, on the data and tokenizer of the recipe `base`, whose pretraining has
        `base_settings`."""
        values = self.settings.model_dump(mode="json", include=self.settings.model_fields_set - {"parallel"})
        dropped = {key: None for key in _REPLACED if getattr(base_settings, key, None) is not None}
        return {
            "format": 1,
            "extends": base,
            "name": name,
            "description": f"{self.parameters:,} parameters on {self.tokens:,} tokens, as bessemer scaling suggests.",
            "model": shape_settings(self.model),
            "pretrain": dropped | values | ({} if self.plan is None else self.plan.settings()),
        }


def suggest_for_flops(
    law: LawInUse,
    flops: float,
    *,
    vocab_size: int,
    context_length: int,
    gpus: int | None = None,
    card: Card | None = None,
    confidence: float = 0.9,
) -> Suggestion:
    """The compute-optimal run of a number of FLOPs. Raises ConfigError where no shape has the size, DoesNotFitError where the
    GPUs, when they are given, cannot hold it."""
    wanted, _ = law.law.optimal(flops)
    model = shape_for(wanted, vocab_size=vocab_size, context_length=context_length, count=law.count)
    tokens = flops / FLOPS_PER_PARAMETER_TOKEN / counted(model, law.count)
    return _suggestion(law, model, tokens, context_length, gpus, card, confidence)


def suggest_for_time(
    law: LawInUse, days: float, *, gpus: int, card: Card, vocab_size: int, context_length: int, confidence: float = 0.9
) -> Suggestion:
    """The compute-optimal run for GPUs and days, at the speed that the planner predicts for the suggested model."""
    flops = days * _SECONDS_PER_DAY * gpus * card.flops * card.achievable
    for _ in range(_ROUNDS):
        suggestion = suggest_for_flops(
            law, flops, vocab_size=vocab_size, context_length=context_length, gpus=gpus, card=card, confidence=confidence
        )
        assert suggestion.plan is not None
        tokens = suggestion.plan.tokens_per_second * days * _SECONDS_PER_DAY
        reached = FLOPS_PER_PARAMETER_TOKEN * suggestion.parameters * tokens
        if abs(reached / flops - 1) < _CLOSE:
            break
        flops = reached
    # layouts and shapes are discrete: the number of tokens makes up the rest
    return _suggestion(law, suggestion.model, tokens, context_length, gpus, card, confidence)


def _suggestion(
    law: LawInUse,
    model: ModelConfig,
    tokens: float,
    context_length: int,
    gpus: int | None,
    card: Card | None,
    confidence: float,
) -> Suggestion:
    parameters = counted(model, law.count)
    rules = ladder_settings(counted(model, "non-embedding"))
    settings = _settings(rules, tokens, context_length, gpus or 1, on_gpu=card is not None and card.name != "cpu")
    assert settings.tokens is not None
    return Suggestion(
        law,
        model,
        float(FLOPS_PER_PARAMETER_TOKEN * parameters * settings.tokens),
        parameters,
        settings.tokens,
        settings,
        float(law.law.predict(parameters, settings.tokens)),
        law.interval(parameters, settings.tokens, confidence),
        plans(PlannedJob(model, settings, card), gpus, count=1)[0] if card is not None and gpus else None,
    )


def _settings(rules: LadderSettings, tokens: float, context_length: int, gpus: int, *, on_gpu: bool) -> PretrainConfig:
    """The training settings: whole rows, a batch that the GPUs divide, a warm-up of at most a tenth of the run."""
    wanted = rules.batch_tokens / context_length / gpus
    # a few significant bits, so that micro-batches divide it
    unit = gpus * 2 ** max(0, int(wanted).bit_length() - 5)
    rows = max(1, round(wanted * gpus / unit)) * unit
    batch = rows * context_length
    steps = round(tokens / batch)
    if steps < _FEWEST_STEPS:
        raise ConfigError(
            f"{tokens:.3g} tokens are {steps} steps of the {batch:,} tokens that a model of this size wants: the budget is too "
            "small for these rules"
        )
    values: dict[str, Any] = {
        "tokens": steps * batch,
        "batch_size": rows,
        "context_length": context_length,
        "optimizer": "adamw",
        "learning_rate": float(f"{rules.learning_rate:.3g}"),
        "beta2": rules.beta2,
        "warmup_tokens": round(min(rules.warmup_tokens, DECAY_FRACTION * tokens)),
        "decay_fraction": DECAY_FRACTION,
    }
    if on_gpu:
        values |= {"dtype": "bfloat16", "compile": True}
    return PretrainConfig.parse(values, "pretrain")


@dataclass(frozen=True)
class Prediction:
    """What a law says about one run. parameters: as the law counts them; flops: of its training, by the model's own count.

    relative_flops: over those of the largest point that the law was fitted to.
    """

    law: LawInUse
    parameters: int
    tokens: int
    flops: float
    loss: float
    interval: Interval

    @property
    def relative_flops(self) -> float:
        return self.flops / self.law.flops[1]


def predict_loss(law: LawInUse, model: ModelConfig, tokens: int, context_length: int, confidence: float = 0.9) -> Prediction:
    """The loss at the end of training `model` on `tokens` tokens in rows of `context_length`, with the interval of one run."""
    parameters = counted(model, law.count)
    flops = float(model.flops_per_token(context_length)) * tokens
    loss = float(law.law.predict(parameters, tokens))
    return Prediction(law, parameters, tokens, flops, loss, law.interval(parameters, tokens, confidence))
