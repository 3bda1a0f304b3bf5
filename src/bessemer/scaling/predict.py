"""The loss of a run that has not been trained, by a law."""

from __future__ import annotations

from dataclasses import dataclass

from bessemer.model.config import ModelConfig
from bessemer.scaling.ladder import counted
from bessemer.scaling.laws.bootstrap import Interval
from bessemer.scaling.suggest import LawInUse


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
