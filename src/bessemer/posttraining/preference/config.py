"""Settings of the stage `preference`, and its losses by name. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import setting
from bessemer.core.errors import ConfigError
from bessemer.core.registry import Plugin, Registry
from bessemer.posttraining.data.made import (
    FORGETTING,
    MISMATCHED,
    ON_BAD_ROW,
    PLACES,
    TRUNCATE,
    OnBadRow,
    Truncate,
    checked_pairs,
)
from bessemer.training.adapter_config import TuningConfig

if TYPE_CHECKING:
    from bessemer.posttraining.preference.losses import PairLoss


#: The losses of single answers, one of which learns and one of which forgets; all others are losses of pairs.
KTO, NPO = "kto", "npo"
SINGLE_ANSWERS = (KTO, NPO)

_LOSSES = "bessemer.posttraining.preference.losses"

_OURS: list[Plugin[PairLoss]] = [
    Plugin("sigmoid", "DPO; with label_smoothing conservative DPO", f"{_LOSSES}:SIGMOID"),
    Plugin("sigmoid_norm", "DPO on mean log-probabilities", f"{_LOSSES}:SIGMOID_NORM"),
    Plugin("hinge", "a margin of 1, as of SLiC", f"{_LOSSES}:HINGE"),
    Plugin("ipo", "a squared distance from a fixed margin", f"{_LOSSES}:IPO"),
    Plugin("robust", "DPO where a known share of labels is swapped", f"{_LOSSES}:ROBUST"),
    Plugin("apo_zero", "chosen answers up, rejected down", f"{_LOSSES}:APO_ZERO"),
    Plugin("apo_down", "both down, rejected more", f"{_LOSSES}:APO_DOWN"),
    Plugin("sppo_hard", "each answer to a fixed log-ratio", f"{_LOSSES}:SPPO_HARD"),
    Plugin("simpo", "mean log-probabilities and a margin, no reference", f"{_LOSSES}:SIMPO"),
    Plugin("orpo", "odds ratio and cross-entropy in one, no reference", f"{_LOSSES}:ORPO"),
]
#: Our own losses: for these it is known which settings they use.
BUILT_IN = tuple(one.name for one in _OURS)

#: Default β. SimPO's applies to mean log-probabilities; 2 is the smallest good value of Meng et al. (2024).
_BETA, _BETAS = 0.1, {"simpo": 2.0}


def default_beta(loss: str) -> float:
    """β of a loss of pairs, or of single answers, where nothing is said."""
    return _BETAS.get(loss, _BETA)


PAIR_LOSSES: Registry[PairLoss] = Registry("preference loss", "bessemer.preference_losses", _OURS)


#: Raised when the same settings and inputs give other weights than before.
PREFERENCE_VERSION = 8

_WITHOUT_SMOOTHING = ("hinge", "ipo", "apo_zero", "apo_down", "sppo_hard", "orpo")


class PreferenceConfig(TuningConfig):
    """The stage `preference`: DPO and its kin, on pairs of a chosen and a rejected answer. The defaults suit a real model."""

    shorthand: ClassVar[str | None] = "data"

    data: list[str] = setting(
        description="Pairs: " + PLACES + ": {prompt, chosen, rejected}, in messages or "
        "texts; made/mismatched, of the conversations of sft; made/preferences and made/honesty, of stages above. With "
        "kto and npo also files of single answers, {prompt, completion, label}; npo forgets those whose label is false, and "
        "has made/forgetting, of the stage forgetting.",
        min_length=1,
    )
    loss: str = setting(
        "sigmoid",
        "sigmoid (DPO), sigmoid_norm, hinge, ipo, robust, apo_zero, apo_down, sppo_hard; simpo and orpo, which need no "
        "reference; kto, for single good or bad answers; npo, which unlearns; or one that an installed package adds (entry "
        "points bessemer.preference_losses).",
        plugins="bessemer.preference_losses",
    )
    beta: float = setting(
        default_beta("sigmoid"),
        "How strongly the policy is held to the reference; for orpo a factor of the loss; for simpo, whose default is 2, the "
        "scale of the mean log-probabilities.",
        gt=0,
    )
    label_smoothing: float = setting(
        0.0, "sigmoid, sigmoid_norm, robust and simpo: share of pairs whose labels are assumed to be swapped.", ge=0, lt=0.5
    )
    margin: float | None = setting(
        None, "simpo: target margin γ between β times the mean log-probabilities of both answers; absent: half of beta.", ge=0
    )
    next_token_weight: float = setting(
        0.0, "Weight of the chosen answers' mean cross-entropy beside a loss of pairs (RPO); orpo has its own.", ge=0
    )
    desirable_weight: float = setting(1.0, "kto: weight of good answers' losses, to balance them with the bad ones.", gt=0)
    undesirable_weight: float = setting(1.0, "kto: weight of bad answers' losses.", gt=0)
    retain_weight: float = setting(
        1.0, "npo: weight of the mean cross-entropy of what is to be kept, beside the loss of what is to be forgotten.", ge=0
    )
    validation_share: float = setting(
        0.05,
        "Fraction of the prompts whose pairs are held out; all pairs of a prompt are on the same side. npo: of what is to be "
        "kept.",
        ge=0,
        lt=1,
    )
    truncate: Truncate = setting("drop", TRUNCATE)
    on_bad_row: OnBadRow = setting("skip", ON_BAD_ROW)
    epochs: float = setting(1.0, "Passes over the pairs; without effect when steps is given.", gt=0)

    optimizer: str = setting("adamw", "As in pretrain.", code=True)
    learning_rate: float = setting(1e-6, "Peak learning rate.", gt=0)
    context_length: int = setting(
        1024, "Tokens of a row, which holds whole pairs: an answer with its prompt at most half.", gt=1
    )
    warmup_fraction: float | None = setting(
        0.1, "Fraction of the steps in which the learning rate rises from zero.", ge=0, le=1
    )
    decay_fraction: float | None = setting(
        0.9, "wsd: fraction of the steps, at the end, in which the learning rate falls to zero.", ge=0, le=1
    )

    @property
    def packed(self) -> bool:
        """Whether rows hold several conversations that do not attend to each other."""
        return True

    @model_validator(mode="before")
    @classmethod
    def _suit_loss(cls, values: Any) -> Any:
        """β of the loss, where it is not given."""
        if not isinstance(values, Mapping) or not isinstance(values.get("loss"), str):
            return values
        return {"beta": default_beta(values["loss"]), **values}

    @field_validator("data")
    @classmethod
    def _known_data(cls, names: list[str]) -> list[str]:
        return [name if name == FORGETTING else checked_pairs([name])[0] for name in names]

    @model_validator(mode="after")
    def _check_made_pairs(self) -> Self:
        if self.loss in SINGLE_ANSWERS and MISMATCHED in self.data:
            raise ValueError(f"data: {self.loss} learns from single answers, and {MISMATCHED} is of pairs; name files")
        if self.loss != NPO and FORGETTING in self.data:
            raise ValueError(
                f"data: {FORGETTING} holds what is to be forgotten, and loss {self.loss} forgets nothing; take {NPO}"
            )
        return self

    @model_validator(mode="after")
    def _check_unused(self) -> Self:
        unused = {
            "label_smoothing": self.label_smoothing > 0 and self.loss in (*SINGLE_ANSWERS, *_WITHOUT_SMOOTHING),
            "margin": self.margin is not None and self.loss in (*SINGLE_ANSWERS, *BUILT_IN) and self.loss != "simpo",
            "next_token_weight": self.next_token_weight > 0 and self.loss in SINGLE_ANSWERS,
            "desirable_weight": self.desirable_weight != 1 and self.loss != KTO,
            "undesirable_weight": self.undesirable_weight != 1 and self.loss != KTO,
            "retain_weight": self.retain_weight != 1 and self.loss != NPO,
        }
        for name, is_given in unused.items():
            if is_given:
                raise ValueError(f"{name}: loss {self.loss} has none; leave it out")
        if self.z_loss:
            raise ValueError("z_loss is of losses of the next token, which preference has not; leave it out")
        return self

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, name: str) -> str:
        if name in SINGLE_ANSWERS:
            return name
        try:
            PAIR_LOSSES.find(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return name
