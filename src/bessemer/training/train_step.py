"""One step of training: the gradients of a whole batch, however it is cut, clipping, and the move.

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
from bessemer.training.data.batches import IGNORED, Batch, Batches
from bessemer.training.moe_losses import balance_experts, visits_by_layer
from bessemer.training.objectives import Loss
from bessemer.training.optim.build import step_optimizers
from bessemer.training.optim.weight_averaging import MovingAverage
from bessemer.training.precision import LossScale, Unscaled
from bessemer.training.runtime import Session
from bessemer.training.source_losses import mean_by_source, sums_by_source, token_losses
from bessemer.training.validation import summed_loss

Outcomes = TypeVar("Outcomes")


@dataclass(frozen=True)
class Outcome:
    """What a step came to: mean loss over all targets of the batch, in nats, and the norm of its gradient before clipping.

    moved: whether the weights were changed; a gradient that is not finite, or that `accept` refused, changes nothing.
    """

    loss: float
    gradient_norm: float
    moved: bool


class TrainingStep:
    """Computes gradients and moves the weights, the same on one process and on many.

    A batch is cut by rows over the ranks that read rows of their own, and there into micro-batches. Each piece's loss is the
    mean over its own targets; weighed by its share of all the targets of the step, the pieces' gradients add up to the whole
    batch's, also where targets are masked.
    """

    def __init__(
        self,
        model: Decoder,
        optimizers: Sequence[Optimizer],
        loss: Loss,
        session: Session,
        *,
        gradient_clip: float,
        micro_batch_size: int | None = None,
        mesh: Mesh = ALONE,
        pipeline: Pipeline | None = None,
        average: MovingAverage | None = None,
    ) -> None:
        """pipeline: where the model is cut into stages; it says itself how many micro-batches it wants. average: of the
        weights, brought up to date after each step that moves them."""
        self.average = average
        self.model, self.optimizers, self.loss, self.session, self.mesh = model, optimizers, loss, session, mesh
        self._gradient_clip, self._micro_batch_size, self._pipeline = gradient_clip, micro_batch_size, pipeline
        self._device = torch.device(session.device)
        #: Of the last step: how many tokens visited each expert of each layer, (L, E), over all processes.
        self.visits_LE = torch.zeros(0, 0)
        self.scale: LossScale | Unscaled = LossScale() if session.dtype == "float16" else Unscaled()

    def read(self, batches: Batches, step: int) -> Batch:
        """What this rank works on of a step's batch: of some of its rows all tokens, or those of its place among the ranks
        that share rows."""
        return self._columns(batches.batch(step, self.mesh.layout.rows(self.mesh.rank, batches.batch_size)))

    def run(self, batch: Batch, accept: Callable[[float, float], bool] = lambda loss, norm: True) -> Outcome:
        """One step on this rank's rows. `accept` sees loss and norm, the same on every rank, and may refuse the move."""
        loss = self.gradients(batch)
        norm = clip_gradients(self.model.parameters(), self._gradient_clip, self.mesh, scale=self.scale.value)
        self.scale.update(norm < float("inf"))
        moved = norm < float("inf") and accept(loss, norm)
        if moved:
            step_optimizers(self.optimizers)
            balance_experts(self.model, self.visits_LE)
            if self.average is not None:
                self.average.update()
        else:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
        return Outcome(loss, norm, moved)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While entered, the model has the moving average in place of its weights."""
        assert self.average is not None
        try:
            with self.average.in_place():
                self._announce_weights()
                yield
        finally:
            self._announce_weights()

    def _announce_weights(self) -> None:
        if self._pipeline is not None:
            self._pipeline.weights_changed()

    def gradients(self, batch: Batch) -> float:
        """Add the gradients of the whole step's mean loss to the parameters'; returns that loss."""
        pieces = self._pieces(batch)
        counts = [int((piece.targets_BT != IGNORED).sum()) for piece in pieces]
        layout = self.mesh.layout
        everyone = float(self.mesh.sum(torch.tensor(sum(counts)), layout.tensor * layout.pipeline))
        shares = [count / max(everyone, 1.0) for count in counts]
        #: By stage and micro-batch: a pipeline runs some forwards twice.
        visits: dict[tuple[int, int], Tensor] = {}
        values = self._backward(pieces, [share * self.scale.value for share in shares], visits)
        total = torch.zeros((), dtype=torch.float64)
        for value, share in zip(values, shares, strict=bool(values)):
            total += value.double().cpu() * share
        if visits:  # other stages of a pipeline have other layers
            self.visits_LE = self.mesh.sum(torch.stack(list(visits.values())).sum(0), layout.tensor)
        return float(self.mesh.sum(total, layout.tensor))

    def _backward(
        self, pieces: Sequence[Batch], factors: Sequence[float], visits: dict[tuple[int, int], Tensor]
    ) -> list[Tensor]:
        """Add the gradients of Σ factor · loss to the parameters'; returns the losses, of a pipeline in its last stage.

        visits: takes those of the experts by stage and micro-batch.
        """
        pieces = [piece.to(self._device) for piece in pieces]

        def look(model: Decoder, number: int) -> None:
            if model.config.num_experts:
                visits[getattr(model, "number", 0), number] = visits_by_layer(model)

        if self._pipeline is not None:
            return self._pipeline.gradients(pieces, lambda stage, number: self.loss(stage, pieces[number]), factors, look)
        values = []
        for number, (piece, factor) in enumerate(zip(pieces, factors, strict=True)):
            with self.session.autocast():
                value = self.loss(self.model, piece)
            look(self.model, number)
            (value if factor == 1.0 else value * factor).backward()
            values.append(value.detach())
        return values

    def _pieces(self, batch: Batch) -> list[Batch]:
        size = self._micro_batch_size
        if self._pipeline is not None:
            size = batch.tokens_BT.shape[0] // self._pipeline.micro_batches
        return list(micro_batches_of(batch, size))

    @torch.no_grad()
    def negative_log_likelihood(self, tokens_BT: Tensor, targets_BT: Tensor) -> float:
        """Of the targets that are not ignored, summed over all rows, in nats; every process gives the whole batch and gets
        the same. In evaluation mode, as the caller sets it."""
        rows = self.mesh.layout.rows(self.mesh.rank, tokens_BT.shape[0])

        def summed(model: Decoder, piece: Batch) -> float:
            return summed_loss(model, piece.tokens_BT, piece.targets_BT, piece.positions_BT)

        batch = self._columns(Batch(tokens_BT[rows], targets_BT[rows]))
        total = torch.tensor(sum(self._outcomes(batch, None, summed)), dtype=torch.float64)
        return float(self.mesh.sum(total, self.mesh.layout.tensor))

    @torch.no_grad()
    def losses_by_source(self, batch: Batch) -> dict[str, float]:
        """Mean loss, in nats, of each source's targets in a step's whole batch, from this rank's rows of it; the same on every
        process, and empty where sources are not known. In evaluation mode, as the caller sets it; reads every row once."""

        def summed(model: Decoder, piece: Batch) -> Tensor | None:
            losses_BT = token_losses(model, piece)
            return None if piece.sources_BT is None else torch.stack(sums_by_source(losses_BT, piece)).cpu()

        sums = torch.zeros(2, len(batch.source_names), dtype=torch.float64)
        for found in self._outcomes(batch, self._micro_batch_size, summed):
            sums += 0 if found is None else found
        if not batch.source_names:
            return {}
        sums_S, counts_S = self.mesh.sum(sums, self.mesh.layout.tensor)
        return mean_by_source(sums_S, counts_S, batch.source_names)

    def _columns(self, batch: Batch) -> Batch:
        layout = self.mesh.layout
        return batch if layout.context == 1 else batch.columns(layout.columns(self.mesh.rank, batch.tokens_BT.shape[1]))

    def _outcomes(self, batch: Batch, size: int | None, compute: Callable[[Decoder, Batch], Outcomes]) -> list[Outcomes]:
        """What `compute` makes of the model and of this rank's rows, piece by piece; of a pipeline in its last stage.

        size: rows of a piece, as in `micro_batches_of`; a pipeline cuts as it trains, where the rows divide so.
        """
        if self._pipeline is not None:
            rows = batch.tokens_BT.shape[0]
            size = rows // math.gcd(rows, self._pipeline.micro_batches)
        pieces = [piece.to(self._device) for piece in micro_batches_of(batch, size)]
        if self._pipeline is not None:
            return self._pipeline.outcomes(pieces, lambda stage, number: compute(stage, pieces[number]))
        return [compute(self.model, piece) for piece in pieces]


def micro_batches_of(batch: Batch, size: int | None) -> Iterator[Batch]:
    """A batch's rows in pieces of `size`, the last one perhaps shorter; the batch itself when None."""
    rows = batch.tokens_BT.shape[0]
    if size is None or size >= rows:
        yield batch
        return
    for start in range(0, rows, size):
        yield batch.rows(slice(start, start + size))
