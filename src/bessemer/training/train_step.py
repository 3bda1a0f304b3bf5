"""One optimizer step: gradients of a batch in micro-batches on any mesh, clipping, and the update.

Shapes: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from bessemer.distributed.gradients import clip_gradients
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.distributed.pipeline import Pipeline
from bessemer.model.decoder import Decoder
from bessemer.training.data.batches import IGNORE_INDEX, Batch, BatchSource
from bessemer.training.moe_losses import balance_experts, visits_by_layer
from bessemer.training.objectives import Objective, mean_by_source, sums_by_source, token_losses
from bessemer.training.optim.build import step_optimizers
from bessemer.training.optim.weight_averaging import MovingAverage
from bessemer.training.precision import LossScale, Unscaled
from bessemer.training.runtime import Runtime
from bessemer.training.validation import summed_loss

Value = TypeVar("Value")


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step: mean loss over all targets of the batch, in nats, and gradient norm before clipping.

    updated: whether the weights changed; a step with a gradient that is not finite, or that `accept` refused, is skipped.
    """

    loss: float
    gradient_norm: float
    updated: bool


class TrainStep:
    """Computes gradients and updates the weights, the same on one process and on many.

    A batch is split by rows over the data-parallel ranks, and on each rank into micro-batches. The loss of a micro-batch is the
    mean over its own targets; weighted by its fraction of the step's targets, the gradients of the micro-batches add up to
    those of the whole batch, also where targets are masked.
    """

    def __init__(
        self,
        model: Decoder,
        optimizers: Sequence[Optimizer],
        objective: Objective,
        runtime: Runtime,
        *,
        gradient_clip: float,
        micro_batch_size: int | None = None,
        mesh: Mesh = ALONE,
        pipeline: Pipeline | None = None,
        average: MovingAverage | None = None,
    ) -> None:
        """pipeline: for a model split into pipeline stages; it fixes the number of micro-batches. average: a moving average of
        the weights, updated after each step that changes them."""
        self.model = model
        self.optimizers = optimizers
        self.objective = objective
        self.runtime = runtime
        self.mesh = mesh
        self.average = average
        self._gradient_clip = gradient_clip
        self._micro_batch_size = micro_batch_size
        self._pipeline = pipeline
        self._device = torch.device(runtime.device)
        #: Tokens of the last step routed to each expert of each layer, (L, E), over all processes.
        self.visits_LE = torch.zeros(0, 0)
        self.scale: LossScale | Unscaled = LossScale() if runtime.dtype == "float16" else Unscaled()

    def read(self, batches: BatchSource, step: int) -> Batch:
        """This rank's part of a step's batch: its rows, and under context parallelism its tokens of them."""
        return self._columns(batches.batch(step, self.mesh.layout.rows(self.mesh.rank, batches.batch_size)))

    def run(self, batch: Batch, accept: Callable[[float, float], bool] = lambda loss, norm: True) -> StepResult:
        """One step on this rank's rows. `accept` gets loss and gradient norm, the same on every rank, and may refuse the
        update."""
        loss = self.gradients(batch)
        norm = clip_gradients(self.model.parameters(), self._gradient_clip, self.mesh, scale=self.scale.value)
        self.scale.update(norm < float("inf"))
        updated = norm < float("inf") and accept(loss, norm)
        if updated:
            step_optimizers(self.optimizers)
            balance_experts(self.model, self.visits_LE)
            if self.average is not None:
                self.average.update()
        else:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, norm, updated)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While entered, the model's weights are the moving average."""
        assert self.average is not None
        try:
            with self.average.in_place():
                self._notify_weights_changed()
                yield
        finally:
            self._notify_weights_changed()

    def _notify_weights_changed(self) -> None:
        if self._pipeline is not None:
            self._pipeline.weights_changed()

    def gradients(self, batch: Batch) -> float:
        """Add the gradients of the step's mean loss to those of the parameters; returns that loss."""
        micro_batches = self._micro_batches(batch)
        counts = [int((micro_batch.targets_BT != IGNORE_INDEX).sum()) for micro_batch in micro_batches]
        layout = self.mesh.layout
        all_targets = float(self.mesh.sum(torch.tensor(sum(counts)), layout.tensor * layout.pipeline))
        weights = [count / max(all_targets, 1.0) for count in counts]
        #: By stage and micro-batch: a pipeline runs some forward passes twice.
        visits: dict[tuple[int, int], Tensor] = {}
        losses = self._backward(micro_batches, [weight * self.scale.value for weight in weights], visits)
        total = torch.zeros((), dtype=torch.float64)
        for loss, weight in zip(losses, weights, strict=bool(losses)):
            total += loss.double().cpu() * weight
        if visits:
            # a sum over stages too: each pipeline stage fills in its own layers
            self.visits_LE = self.mesh.sum(torch.stack(list(visits.values())).sum(0), layout.tensor)
        return float(self.mesh.sum(total, layout.tensor))

    def _backward(
        self, micro_batches: Sequence[Batch], factors: Sequence[float], visits: dict[tuple[int, int], Tensor]
    ) -> list[Tensor]:
        """Add the gradients of Σ factor · loss to those of the parameters; returns the losses, of a pipeline in its last stage.

        visits: receives the token counts of the experts by stage and micro-batch.
        """
        micro_batches = [micro_batch.to(self._device) for micro_batch in micro_batches]

        def after_forward(model: Decoder, number: int) -> None:
            if model.config.num_experts:
                visits[getattr(model, "number", 0), number] = visits_by_layer(model)

        if self._pipeline is not None:
            return self._pipeline.gradients(
                micro_batches, lambda stage, number: self.objective(stage, micro_batches[number]), factors, after_forward
            )
        losses = []
        for number, (micro_batch, factor) in enumerate(zip(micro_batches, factors, strict=True)):
            with self.runtime.autocast():
                loss = self.objective(self.model, micro_batch)
            after_forward(self.model, number)
            (loss if factor == 1.0 else loss * factor).backward()
            losses.append(loss.detach())
        return losses

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        size = self._micro_batch_size
        if self._pipeline is not None:
            size = batch.tokens_BT.shape[0] // self._pipeline.micro_batches
        return list(micro_batches_of(batch, size))

    @torch.no_grad()
    def negative_log_likelihood(self, tokens_BT: Tensor, targets_BT: Tensor) -> float:
        """−log p summed over the targets of all rows, in nats. Every process passes the whole batch and gets the same sum; the
        caller sets evaluation mode."""
        rows = self.mesh.layout.rows(self.mesh.rank, tokens_BT.shape[0])

        def summed(model: Decoder, micro_batch: Batch) -> float:
            return summed_loss(model, micro_batch.tokens_BT, micro_batch.targets_BT, micro_batch.positions_BT)

        batch = self._columns(Batch(tokens_BT[rows], targets_BT[rows]))
        total = torch.tensor(sum(self._for_each_micro_batch(batch, None, summed)), dtype=torch.float64)
        return float(self.mesh.sum(total, self.mesh.layout.tensor))

    @torch.no_grad()
    def losses_by_source(self, batch: Batch) -> dict[str, float]:
        """Mean loss, in nats, of each source's targets in a step's whole batch, from this rank's rows of it; the same on every
        process, and empty where sources are not known. One forward pass; the caller sets evaluation mode."""

        def summed(model: Decoder, micro_batch: Batch) -> Tensor | None:
            losses_BT = token_losses(model, micro_batch)
            return None if micro_batch.sources_BT is None else torch.stack(sums_by_source(losses_BT, micro_batch)).cpu()

        sums = torch.zeros(2, len(batch.source_names), dtype=torch.float64)
        for micro_batch_sums in self._for_each_micro_batch(batch, self._micro_batch_size, summed):
            sums += 0 if micro_batch_sums is None else micro_batch_sums
        if not batch.source_names:
            return {}
        sums_S, counts_S = self.mesh.sum(sums, self.mesh.layout.tensor)
        return mean_by_source(sums_S, counts_S, batch.source_names)

    def _columns(self, batch: Batch) -> Batch:
        layout = self.mesh.layout
        return batch if layout.context == 1 else batch.columns(layout.columns(self.mesh.rank, batch.tokens_BT.shape[1]))

    def _for_each_micro_batch(self, batch: Batch, size: int | None, compute: Callable[[Decoder, Batch], Value]) -> list[Value]:
        """`compute(model, micro_batch)` of this rank's rows, without gradients; of a pipeline in its last stage.

        size: rows of a micro-batch, as in `micro_batches_of`; a pipeline splits as in training, where the rows divide so.
        """
        if self._pipeline is not None:
            rows = batch.tokens_BT.shape[0]
            size = rows // math.gcd(rows, self._pipeline.micro_batches)
        micro_batches = [micro_batch.to(self._device) for micro_batch in micro_batches_of(batch, size)]
        if self._pipeline is not None:
            return self._pipeline.forward(micro_batches, lambda stage, number: compute(stage, micro_batches[number]))
        return [compute(self.model, micro_batch) for micro_batch in micro_batches]


def micro_batches_of(batch: Batch, size: int | None) -> Iterator[Batch]:
    """A batch's rows in micro-batches of `size` rows, the last one possibly smaller; the batch itself when None."""
    rows = batch.tokens_BT.shape[0]
    if size is None or size >= rows:
        yield batch
        return
    for start in range(0, rows, size):
        yield batch.rows(slice(start, start + size))
