"""Training objectives: sums of named terms over denominators, and next-token prediction.

The loss of a step is the sum over terms of (a sum over the tokens or sequences of the whole batch) / (the term's
denominator). Both are taken over all micro-batches and ranks, so that the gradient does not depend on how a batch is split.

Shapes: N tokens of all rows, C tokens of a chunk, D hidden, V vocabulary, B rows, T time, S sources.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bessemer.distributed.collectives import all_reduce
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.head import linear_cross_entropy
from bessemer.training.model_roles import POLICY, ModelRoles
from bessemer.training.optim.registry import OptimizerSettings
from bessemer.training.routing import has_router_losses, router_losses

#: A loss of the user's own: of a model and a batch, the mean over the batch's targets.
LossFunction = Callable[[Decoder, Batch], Tensor]

#: From a model, hidden states (B, T, D), targets (B, T) and the weight of the z-loss to a sum over the targets.
SummedLoss = Callable[[Decoder, Tensor, Tensor, float], Tensor]


class Count(NamedTuple):
    """This data rank's part of a term's denominator. A constant is the same on every rank; the others add up over ranks."""

    value: float
    per: Literal["token", "sequence", "constant"] = "token"


@dataclass(frozen=True)
class Metric:
    """A figure of a micro-batch, for the log: its mean over the whole batch is the sum of sums over the sum of counts.

    max: the largest value, of which the largest of all is logged as `NAME_max`; None: not logged.
    """

    sum: Tensor
    count: Tensor | float
    max: Tensor | None = None


class Terms(NamedTuple):
    """Sums of the terms of a micro-batch's loss, scalars with gradients, and figures without. Names are the same in every call
    with the same role."""

    sums: Mapping[str, Tensor]
    metrics: Mapping[str, Metric] = {}


@dataclass(frozen=True)
class LossContext:
    """The role of the model that an objective is computed for, and the mesh, whose context axis shares rows.

    The sums of all ranks of the context axis are added. A sum over tokens needs nothing: each rank has its own. A value of a
    sequence is on every rank of the axis; a sum over such values is counted `once`.
    """

    mesh: Mesh = ALONE
    role: str = POLICY

    def sum_over_context(self, values: Tensor) -> Tensor:
        """The sum over the ranks that share this one's rows, as in `Batch.sequence_sums`; differentiable."""
        return values if self.mesh.layout.context == 1 else all_reduce(values, self.mesh.context)

    def once(self, total: Tensor) -> Tensor:
        """This rank's share of a sum that every rank of the context axis has whole."""
        return total if self.mesh.layout.context == 1 else total / self.mesh.layout.context


class Objective(ABC):
    """The loss of a training method. One object serves every step; it keeps no state between them."""

    #: Whether a loss far above those before it is a sign of trouble. Of rewards and advantages it is not.
    guards_loss = True

    @abstractmethod
    def denominators(self, batch: Batch) -> Mapping[str, Count]:
        """The denominator of every term, in this data rank's annotated rows, not yet cut. A term of another role is one of its
        own. Names are the same for every batch."""

    @abstractmethod
    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        """The terms of a micro-batch for the model of a role, which is called once for each trained role.

        In a pipeline `model` is the last stage: call it for hidden states exactly once, with the batch's own tokens.
        """

    def annotate(self, models: ModelRoles, batch: Batch) -> Batch:
        """The batch with what no gradient flows through: log-probabilities of a reference, old ones, values, advantages.

        Called on every rank with its rows before they are cut into micro-batches, and without gradients.
        """
        return batch

    @torch.no_grad()
    def token_losses(self, model: Decoder, batch: Batch) -> Tensor | None:
        """The loss of each target, (B, T), in nats, for losses by source; None where tokens have none. It runs the model once
        in any case: diagnostics read its activations."""
        model.hidden(**batch.inputs)
        return None


class NextTokenObjective(Objective):
    """Cross-entropy of the targets, and what the model's settings add in training: `mtp`, the loss of multi-token prediction,
    and `router`, the router losses. In evaluation mode the cross-entropy alone."""

    def __init__(self, model: ModelConfig, z_loss: float = 0.0, training_loss: SummedLoss | None = None) -> None:
        """z_loss: as in `linear_cross_entropy`. training_loss: what is minimised in place of the cross-entropy."""
        self._z_loss = z_loss
        self._training_loss = training_loss or _cross_entropy
        self._names = ["next_token"]
        if model.num_nextn_predict_layers:
            self._names.append("mtp")
        if has_router_losses(model):
            self._names.append("router")

    def denominators(self, batch: Batch) -> dict[str, Count]:
        return dict.fromkeys(self._names, Count(batch.targets))

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        if not model.training:
            return Terms(_next_token_sums(model, batch, plain=True))
        return Terms(_next_token_sums(model, batch, self._z_loss, loss=self._training_loss))

    def token_losses(self, model: Decoder, batch: Batch) -> Tensor:
        """−log p of each target."""
        return token_losses(model, batch)


class FunctionObjective(Objective):
    """A user's loss function."""

    def __init__(self, function: LossFunction) -> None:
        self._function = function

    def denominators(self, batch: Batch) -> dict[str, Count]:
        return {"loss": Count(batch.targets)}

    def __call__(self, model: Decoder, batch: Batch, context: LossContext) -> Terms:
        """The function's mean times the micro-batch's targets."""
        return Terms({"loss": self._function(model, batch) * _target_count(batch)})

    def token_losses(self, model: Decoder, batch: Batch) -> Tensor:
        """−log p of each target: a function gives no loss of single tokens."""
        return token_losses(model, batch)


def build_objective(config: OptimizerSettings, model: ModelConfig) -> Objective:
    """Next-token prediction with a run's settings."""
    return NextTokenObjective(model, config.z_loss)


def as_objective(given: Objective | LossFunction) -> Objective:
    """An objective itself, or that of a loss function."""
    return given if isinstance(given, Objective) else FunctionObjective(given)


def next_token_loss(model: Decoder, batch: Batch, *, z_loss: float = 0.0) -> Tensor:
    """The mean over a batch's targets that `NextTokenObjective` minimises, in nats: for loss functions that build on it."""
    total: Tensor = torch.stack([*_next_token_sums(model, batch, z_loss).values()]).sum()
    return total / _target_count(batch).clamp(min=1)


def _next_token_sums(
    model: Decoder, batch: Batch, z_loss: float = 0.0, *, plain: bool = False, loss: SummedLoss | None = None
) -> dict[str, Tensor]:
    """The terms by name. plain: the cross-entropy alone. loss: in place of the cross-entropy."""
    loss = loss or _cross_entropy
    tokens_BT, positions_BT, documents_BT = batch.tokens_BT, batch.positions_BT, batch.document_ids_BT
    if plain or not model.config.num_nextn_predict_layers:
        hidden_BTD = model.hidden(**batch.inputs)
        sums = {"next_token": loss(model, hidden_BTD, batch.targets_BT, z_loss)}
    else:
        hidden_BTD, mtp_hidden = model.hidden_and_mtp(tokens_BT, positions_BT=positions_BT, document_ids_BT=documents_BT)
        sums = {"next_token": loss(model, hidden_BTD, batch.targets_BT, z_loss)}
        # over the number of next-token targets (DeepSeek-V3, eq. 24)
        further = [
            loss(model, mtp_hidden_BTD, mtp_targets(batch.targets_BT, documents_BT, step), z_loss)
            for step, mtp_hidden_BTD in enumerate(mtp_hidden, start=1)
        ]
        sums["mtp"] = torch.stack(further).sum() * (MTP_LOSS_WEIGHT / len(further))
    if not plain and has_router_losses(model.config):
        losses = torch.as_tensor(router_losses(model, batch.targets_BT), device=hidden_BTD.device)
        sums["router"] = losses * _target_count(batch)
    return sums


def _target_count(batch: Batch) -> Tensor:
    """Number of targets, on the batch's device: the host does not wait for it."""
    return (batch.targets_BT != IGNORE_INDEX).sum()


#: λ of DeepSeek-V3, section 2.2, as it was for most of its training.
MTP_LOSS_WEIGHT = 0.3


def mtp_targets(targets_BT: Tensor, document_ids_BT: Tensor | None, step: int) -> Tensor:
    """Targets of multi-token prediction, `step` tokens after the next-token targets, (B, T).

    -100 where they lie in another document or beyond the row, and for a token without a next-token target.
    """
    length = targets_BT.shape[1]
    further_BT = torch.full_like(targets_BT, IGNORE_INDEX)
    further_BT[:, : length - step] = targets_BT[:, step:]
    if document_ids_BT is not None:
        same_BT = document_ids_BT[:, step:] == document_ids_BT[:, : length - step]
        further_BT[:, : length - step].masked_fill_(~same_BT, IGNORE_INDEX)
    return further_BT.masked_fill_(targets_BT == IGNORE_INDEX, IGNORE_INDEX)


def _cross_entropy(model: Decoder, hidden_BTD: Tensor, targets_BT: Tensor, z_loss: float) -> Tensor:
    return linear_cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, targets_BT.flatten(), model.logit_softcap, z_loss)


#: Logits held at a time by `token_losses`, which takes no gradients.
_SCORING_CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def token_losses(model: Decoder, batch: Batch) -> Tensor:
    """−log p of each target, (B, T) float32, in nats; zero where there is no target."""
    hidden_BTD = model.hidden(**batch.inputs)
    hidden_ND, targets_N = hidden_BTD.flatten(0, 1), batch.targets_BT.flatten()
    rows = max(1, _SCORING_CHUNK_ELEMENTS // model.config.vocab_size)
    losses = [
        cross_entropy(model.logits(hidden_CD).float(), targets_C, reduction="none", ignore_index=IGNORE_INDEX)
        for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
    ]
    return torch.cat(losses).view_as(batch.targets_BT)


def sums_by_source(losses_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum of the losses of each source's targets, and their number, (S,) float64 on the host, in the order of
    `batch.source_names`.

    Sums of ranks and of batches with the same names add up; `mean_by_source` turns them into means by name.
    """
    assert batch.sources_BT is not None
    has_target_BT = batch.targets_BT.cpu() != IGNORE_INDEX
    sources_N, count = batch.sources_BT.cpu()[has_target_BT].long(), len(batch.source_names)
    sums_S = torch.zeros(count, dtype=torch.float64)
    sums_S.index_add_(0, sources_N, losses_BT.cpu()[has_target_BT].double())
    return sums_S, torch.bincount(sources_N, minlength=count).double()


def mean_by_source(sums_S: Tensor, counts_S: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """Mean loss, in nats per token, of each source that has any."""
    return {
        name: total / number for name, total, number in zip(names, sums_S.tolist(), counts_S.tolist(), strict=True) if number
    }
