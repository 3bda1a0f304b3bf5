"""Losses of pairs by name. Imports no PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bessemer.core.registry import Plugin, Registry

if TYPE_CHECKING:
    from bessemer.posttraining.preference.losses import PairLoss

#: The loss of single answers, which is no loss of pairs.
KTO = "kto"

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
#: Those that no other package adds, whose settings are known.
BUILT_IN = tuple(one.name for one in _OURS)

#: β where nothing is said: that of SimPO is of mean log-probabilities, and 2 the smallest that Meng et al. (2024) found good.
_BETA, _BETAS = 0.1, {"simpo": 2.0}


def default_beta(loss: str) -> float:
    """β of a loss of pairs, or of single answers, where nothing is said."""
    return _BETAS.get(loss, _BETA)


PAIR_LOSSES: Registry[PairLoss] = Registry("preference loss", "bessemer.preference_losses", _OURS)
