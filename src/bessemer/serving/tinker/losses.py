"""The losses that a Tinker client names, each a sum over tokens, and the objective that the trainer takes them as.

p is the learner's probability of a target, q the sampler's, whose logarithm the client sends as `logprobs`; ρ = p / q, A the
token's advantage.

    cross_entropy         −w log p
    importance_sampling   −ρ A
    ppo                   −min(ρ A, clip(ρ) A)                 bounds 0.8 and 1.2 (Schulman et al. 2017, eq. 7)
    cispo                 −sg(clip(ρ)) A log p                 bounds 0.8 and 1.2 (MiniMax-M1, 2025, eq. 4)
    gspo                  ppo with ρ the geometric mean over the tokens of `sequence_ratio_mask`, of which each token has the
                          value and its own gradient           bounds 1 − 0.0003 and 1 + 0.0004 (Zheng et al. 2025, section 5.1)
    dro                   −(A log p − ½ β (log ρ)²)            β 0.05 (Richemond et al. 2024)

Nothing is divided: the client scales weights and advantages, and the gradients of several requests add up until `optim_step`.

Shapes: B examples, T tokens, K targets of a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bessemer.core.config import nearest
from bessemer.core.errors import RequestError
from bessemer.model.decoder import Decoder
from bessemer.serving.tinker.wire import Datum
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.head import target_log_probs
from bessemer.training.objectives import Count, LossContext, Objective, Terms

#: Name of the targets among an example's tensors.
TARGETS = "target_tokens"
#: Tokens whose logits are in memory at a time where a token has several targets.
_TOKENS_AT_ONCE = 256


class Values:
    """Tensors of a micro-batch by name, and the settings of its loss; a tensor is preferred to a setting of the same name."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, float]) -> None:
        self.tensors = tensors
        self._config = config

    def bound(self, name: str, like: Tensor, default: float) -> Tensor:
        """A number for each token: a tensor of the examples, a setting, or the default."""
        given = self.tensors.get(name)
        return torch.full_like(like, self._config.get(name, default)) if given is None else given

    def number(self, name: str, default: float) -> float:
        return self._config.get(name, default)


TokenLoss = Callable[[Tensor, Values], Tensor]


def cross_entropy(log_probs: Tensor, values: Values) -> Tensor:
    """−w log p, (B, T) or (B, T, K)."""
    return -values.tensors["weights"] * log_probs


def importance_sampling(log_probs_BT: Tensor, values: Values) -> Tensor:
    """−ρ A."""
    return -(log_probs_BT - values.tensors["logprobs"]).exp() * values.tensors["advantages"]


def ppo(log_probs_BT: Tensor, values: Values) -> Tensor:
    """−min(ρ A, clip(ρ) A)."""
    return _clipped((log_probs_BT - values.tensors["logprobs"]).exp(), values, 0.8, 1.2)


def cispo(log_probs_BT: Tensor, values: Values) -> Tensor:
    """−sg(clip(ρ)) A log p: a token beyond the bounds keeps its gradient, at the bound's weight."""
    ratios_BT = (log_probs_BT - values.tensors["logprobs"]).exp()
    return -_held(ratios_BT, values, 0.8, 1.2).detach() * values.tensors["advantages"] * log_probs_BT


def gspo(log_probs_BT: Tensor, values: Values) -> Tensor:
    """ppo, with the ratio of the whole sequence as the value of each token's."""
    mask_BT = (values.tensors["sequence_ratio_mask"] != 0).to(log_probs_BT.dtype)
    log_ratios_BT = (log_probs_BT.detach() - values.tensors["logprobs"]) * mask_BT
    mean_B1 = log_ratios_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return _clipped((mean_B1 + log_probs_BT - log_probs_BT.detach()).exp(), values, 1 - 3e-4, 1 + 4e-4)


def dro(log_probs_BT: Tensor, values: Values) -> Tensor:
    """−(A log p − ½ β (log ρ)²)."""
    log_ratios_BT = log_probs_BT - values.tensors["logprobs"]
    return 0.5 * values.number("beta", 0.05) * log_ratios_BT.square() - values.tensors["advantages"] * log_probs_BT


def _clipped(ratios_BT: Tensor, values: Values, low: float, high: float) -> Tensor:
    advantages_BT = values.tensors["advantages"]
    return -torch.minimum(ratios_BT * advantages_BT, _held(ratios_BT, values, low, high) * advantages_BT)


def _held(ratios_BT: Tensor, values: Values, low: float, high: float) -> Tensor:
    """Ratios within the bounds, which may differ by token."""
    low_BT = values.bound("clip_low_threshold", ratios_BT, low)
    return ratios_BT.maximum(low_BT).minimum(values.bound("clip_high_threshold", ratios_BT, high))


@dataclass(frozen=True)
class NamedLoss:
    """A loss. needs: tensors of each example beside its targets. settings: names of numbers that the client may set."""

    function: TokenLoss
    needs: tuple[str, ...]
    settings: tuple[str, ...] = ()


_RATIO, _BOUNDS = ("logprobs", "advantages"), ("clip_low_threshold", "clip_high_threshold")
LOSSES: dict[str, NamedLoss] = {
    "cross_entropy": NamedLoss(cross_entropy, ("weights",)),
    "importance_sampling": NamedLoss(importance_sampling, _RATIO),
    "ppo": NamedLoss(ppo, _RATIO, _BOUNDS),
    "cispo": NamedLoss(cispo, _RATIO, _BOUNDS),
    "gspo": NamedLoss(gspo, (*_RATIO, "sequence_ratio_mask"), _BOUNDS),
    "dro": NamedLoss(dro, _RATIO, ("beta",)),
}


def find_loss(name: str) -> NamedLoss:
    """The loss of a name. Raises RequestError, with the nearest name."""
    if name == "custom":
        raise RequestError("loss_fn custom: this server runs no losses of clients; the client computes them (custom losses)")
    if name not in LOSSES:
        raise RequestError(f"loss_fn {name!r}: this server has {', '.join(LOSSES)}{nearest(name, list(LOSSES))}")
    return LOSSES[name]


def checked_config(name: str, config: Mapping[str, float | str]) -> dict[str, float]:
    """The settings of a loss. Raises RequestError for one that it does not have, or that is no number."""
    known = find_loss(name).settings
    numbers: dict[str, float] = {}
    for setting, value in config.items():
        if setting not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise RequestError(f"loss_fn_config.{setting}: not a setting of {name}; {has}")
        if isinstance(value, str) or not np.isfinite(value):
            raise RequestError(f"loss_fn_config.{setting}: {value!r} is no number")
        numbers[setting] = float(value)
    return numbers


def check_data(name: str, data: Sequence[Datum], *, vocabulary: int, longest: int) -> None:
    """Raise RequestError, naming the example, where a loss cannot be computed from the data."""
    loss = find_loss(name)
    known = dict.fromkeys((TARGETS, *loss.needs, *loss.settings, "weights"))
    if not data:
        raise RequestError("data: there is no example")
    for number, datum in enumerate(data):
        where, length = f"data[{number}]", len(datum.tokens_T)
        if not 0 < length <= longest:
            raise RequestError(f"{where}: {length:,} tokens; an example has between 1 and {longest:,}")
        for missing in (each for each in (TARGETS, *loss.needs) if each not in datum.inputs and each != "weights"):
            raise RequestError(f"{where}: {name} needs {missing}, one for each of its {length:,} tokens")
        for tensor, values in datum.inputs.items():
            if tensor not in known:
                raise RequestError(f"{where}: {name} has no use for {tensor!r}; it takes {', '.join(known)}")
            shape = datum.inputs[TARGETS].shape if tensor in (TARGETS, "weights") else (length,)
            if values.shape != shape or values.shape[0] != length:
                raise RequestError(f"{where}: {tensor} has the shape {values.shape}, and its input {length:,} tokens")
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise RequestError(f"{where}: {tensor} has a number that is not finite")
        if datum.inputs[TARGETS].ndim > (2 if name == "cross_entropy" else 1):
            raise RequestError(f"{where}: {name} takes one target for each token")
        for tensor, ids in (("model_input", datum.tokens_T), (TARGETS, datum.inputs[TARGETS])):
            if ids.dtype.kind != "i" or ids.size == 0 or ids.min() < 0 or ids.max() >= vocabulary:
                raise RequestError(f"{where}: {tensor} has an id that is none of this model's {vocabulary:,} tokens")


def batch_of(data: Sequence[Datum]) -> Batch:
    """Examples as rows, padded on the right with tokens without a target and with weight 0."""
    longest = max(len(datum.tokens_T) for datum in data)

    def filled(arrays: Sequence[np.ndarray], fill: float, dtype: torch.dtype) -> Tensor:
        if any(array.ndim == 2 for array in arrays):
            arrays = [array if array.ndim == 2 else array[:, None] for array in arrays]
        shape = (len(arrays), longest, *np.max([array.shape[1:] for array in arrays], axis=0).astype(int))
        rows = torch.full(shape, fill, dtype=dtype)
        for row, array in zip(rows, arrays, strict=True):
            row[tuple(slice(size) for size in array.shape)] = torch.from_numpy(array.copy()).to(dtype)
        return rows

    targets = [datum.inputs[TARGETS] for datum in data]
    names = sorted({"weights", *(name for datum in data for name in datum.inputs)} - {TARGETS})
    tensors = {name: filled([_input(datum, name) for datum in data], 0.0, torch.float32) for name in names}
    tokens_BT = filled([datum.tokens_T for datum in data], 0, torch.int64)
    targets_BT = filled(targets, IGNORE_INDEX, torch.int64)
    return Batch(tokens_BT, targets_BT, per_token=tensors)


def _input(datum: Datum, name: str) -> np.ndarray:
    """A tensor of an example; missing weights are 1."""
    given = datum.inputs.get(name)
    if given is not None:
        return given
    if name != "weights":
        raise RequestError(f"{name}: give it to all examples of a request, or to none")
    return np.ones(datum.inputs[TARGETS].shape, np.float32)


class NamedObjective(Objective):
    """A loss in the trainer's form: one term with the denominator 1. It keeps each micro-batch's log-probabilities of the
    targets, in order."""

    guards_loss = False

    def __init__(self, loss: NamedLoss, config: Mapping[str, float]) -> None:
        self._loss = loss
        self._config = config
        self.log_probs: list[Tensor] = []

    def denominators(self, batch: Batch) -> dict[str, Count]:
        return {"loss": Count(1.0, "constant")}

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        hidden_BTD = model.hidden(**batch.inputs)
        if batch.targets_BT.ndim == 2:
            log_probs, _ = target_log_probs(model, hidden_BTD, batch.targets_BT)
        else:
            log_probs = several_log_probs(model, hidden_BTD, batch.targets_BT)
        self.log_probs.append(log_probs.detach())
        tensors = {name: values.to(log_probs.dtype) for name, values in batch.per_token.items()}
        losses = self._loss.function(log_probs, Values(tensors, self._config))
        if self._loss.function is not cross_entropy:
            losses = losses * tensors["weights"]
        return Terms({"loss": losses.sum()})


def several_log_probs(model: Decoder, hidden_BTD: Tensor, targets_BTK: Tensor) -> Tensor:
    """log p of K targets of each token, (B, T, K) float32; 0 where there is none. Differentiable: the backward pass computes
    the logits of some tokens at a time again (Chen et al. 2016)."""

    def of_some(hidden_CD: Tensor, targets_CK: Tensor) -> Tensor:
        values_CK = model.logits(hidden_CD).float().log_softmax(-1).gather(-1, targets_CK.clamp(min=0))
        return values_CK.masked_fill(targets_CK == IGNORE_INDEX, 0.0)

    hidden_ND, targets_NK = hidden_BTD.flatten(0, 1), targets_BTK.flatten(0, 1)
    parts = [
        checkpoint(of_some, hidden_CD, targets_CK, use_reentrant=False)
        for hidden_CD, targets_CK in zip(hidden_ND.split(_TOKENS_AT_ONCE), targets_NK.split(_TOKENS_AT_ONCE), strict=True)
    ]
    log_probs_NK: Tensor = torch.cat(parts)
    return log_probs_NK.view(targets_BTK.shape)
