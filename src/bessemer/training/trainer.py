"""One optimizer step: gradients of a batch in micro-batches on any mesh, clipping, and the update.

Shapes: B rows of a batch, T tokens of a row, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from bessemer.core.errors import ConfigError
from bessemer.distributed.gradients import clip_gradients
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.distributed.pipeline import Pipeline
from bessemer.model.decoder import Decoder
from bessemer.training.data.batches import Batch, BatchSource
from bessemer.training.model_setup import PreparedModel
from bessemer.training.moe_losses import balance_experts, routing_metrics, visits_by_layer
from bessemer.training.objectives import (
    POLICY,
    LossContext,
    LossFunction,
    Objective,
    Terms,
    as_objective,
    mean_by_source,
    sums_by_source,
)
from bessemer.training.optim.build import step_optimizers
from bessemer.training.optim.weight_averaging import MovingAverage
from bessemer.training.precision import LossScale, Unscaled
from bessemer.training.runtime import Runtime
from bessemer.training.totals import Totals, TotalsReducer, whole_denominators
from bessemer.training.trainee import Trainee
from bessemer.training.validation import summed_loss


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step: the loss over the whole batch, and the gradient norm of the policy before clipping.

    updated: whether the weights changed; a step with a gradient that is not finite, or that `accept` refused, is skipped.
    metrics: the terms of the loss, where it has several, the objective's figures, gradient norms of other trained models, and
    the load of experts.
    """

    loss: float
    gradient_norm: float
    updated: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


class Trainer:
    """Computes gradients and updates the weights, the same on one process and on many.

    A batch is split by rows over the data-parallel ranks, by tokens over the context-parallel ones, and on each rank into
    micro-batches. The loss is a sum of terms, each a sum over the whole batch divided by a denominator of the whole batch, so
    the gradients of the micro-batches add up to those of the whole batch however it is split.
    """

    def __init__(
        self,
        model: Decoder,
        optimizers: Sequence[Optimizer],
        objective: Objective | LossFunction,
        runtime: Runtime,
        *,
        gradient_clip: float,
        micro_batch_size: int | None = None,
        mesh: Mesh = ALONE,
        pipeline: Pipeline | None = None,
        average: MovingAverage | None = None,
        trainee: Trainee | None = None,
    ) -> None:
        """pipeline: for a model split into pipeline stages; it fixes the number of micro-batches. average: a moving average of
        the weights, updated after each step that changes them. trainee: the models by role, where there are several; `model` is
        its policy, and `optimizers` update all that are trained."""
        self.model = model
        self.optimizers = optimizers
        self.objective = as_objective(objective)
        self.runtime = runtime
        self.mesh = mesh
        self.average = average
        self.trainee = trainee or Trainee(
            {POLICY: PreparedModel(model, pipeline)}, runtime, mesh=mesh, micro_batch_size=micro_batch_size
        )
        self._gradient_clip = gradient_clip
        self._device = torch.device(runtime.device)
        self._reducer = TotalsReducer(mesh)
        #: Tokens of the last step routed to each expert of each layer, (L, E), over all processes.
        self.visits_LE = torch.zeros(0, 0)
        self.scale: LossScale | Unscaled = LossScale() if runtime.dtype == "float16" else Unscaled()

    def read(self, batches: BatchSource, step: int) -> Batch:
        """This rank's rows of a step's batch. Raises ConfigError when ranks would separate sequences that belong together."""
        size = batches.batch_size_at(step)
        batch = batches.batch(step, self.trainee.rows(size), self.mesh)
        rows = batch.tokens_BT.shape[0]
        if rows % batch.rows_together:
            raise ConfigError(
                f"batch_size {size} gives each rank {rows} rows, which would separate sequences that are judged "
                f"together, {batch.rows_together} at a time; change it"
            )
        return batch

    def step(self, batch: Batch, accept: Callable[[float, float], bool] = lambda loss, norm: True) -> StepResult:
        """One step on this rank's rows. `accept` gets loss and gradient norm, the same on every rank, and may refuse the
        update."""
        terms, denominators = self._accumulate(batch)
        clipped = [
            clip_gradients(prepared.model.parameters(), self._gradient_clip, self.mesh, scale=self.scale.value)
            for prepared in self.trainee.trained.values()
        ]
        # the one wait of a step for the device: the update hangs on these numbers
        totals, (*values, visits) = self._reducer.reduced_with([*clipped, self.visits_LE], terms, denominators)
        norms = {role: norm for role, (norm,) in zip(self.trainee.trained, values, strict=True)}
        bad = [norm for norm in norms.values() if not norm < float("inf")]
        role, *others = norms
        norm = bad[0] if bad else norms[role]
        self.scale.update(not bad)
        updated = not bad and accept(totals.loss, norm)
        if updated:
            step_optimizers(self.optimizers)
            balance_experts(self.model, self.visits_LE)
            if self.average is not None:
                self.average.update()
        else:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
        self.trainee.version += 1
        metrics = totals.metrics | {f"gradient_norm_{other}": norms[other] for other in others}
        metrics |= routing_metrics(torch.tensor(visits, dtype=torch.float64).view_as(self.visits_LE))
        return StepResult(totals.loss, norm, updated, metrics)

    def gradients(self, batch: Batch) -> Totals:
        """Add the gradients of the step's loss to those of the parameters of every trained model; returns its totals."""
        return self._reducer.reduced(*self._accumulate(batch))

    def _accumulate(self, batch: Batch) -> tuple[list[Terms], dict[str, float]]:
        """Add the gradients; returns the terms by micro-batch, on the device, and their denominators."""
        with torch.no_grad():
            batch = self.objective.annotate(self.trainee, batch)
        denominators = whole_denominators(self.objective.denominators(batch), self.mesh)
        cut = self.trainee.cut(batch)
        terms: list[Terms] = []
        for role, prepared in self.trainee.trained.items():
            terms += self._backward(role, prepared, cut, denominators)
        return terms, denominators

    def _backward(self, role: str, prepared: PreparedModel, cut: Batch, denominators: Mapping[str, float]) -> list[Terms]:
        """Add the gradients of a role's terms to those of its parameters; returns the terms by micro-batch, of a pipeline in
        its last stage."""
        micro_batches = [micro_batch.to(self._device) for micro_batch in self.trainee.micro_batches(cut, prepared)]
        context = LossContext(self.mesh, role)
        terms: dict[int, Terms] = {}
        #: By stage and micro-batch: a pipeline runs some forward passes twice.
        visits: dict[tuple[int, int], Tensor] = {}

        def loss(model: Decoder, number: int) -> Tensor:
            found = terms[number] = self.objective(model, micro_batches[number], context)
            weighted = [total / (denominators[name] or 1.0) for name, total in found.sums.items()]
            whole = weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum()
            return whole if self.scale.value == 1.0 else whole * self.scale.value

        def after_forward(model: Decoder, number: int) -> None:
            if model.config.num_experts and prepared.model is self.model:
                visits[getattr(model, "number", 0), number] = visits_by_layer(model)

        if prepared.pipeline is not None:
            prepared.pipeline.gradients(micro_batches, loss, after_forward)
        else:
            for number in range(len(micro_batches)):
                with self.runtime.autocast():
                    value = loss(prepared.model, number)
                after_forward(prepared.model, number)
                value.backward()
                terms[number] = _detached(terms[number])
        if visits:
            # a sum over stages too: each pipeline stage fills in its own layers
            self.visits_LE = self.mesh.sum(torch.stack(list(visits.values())).sum(0), self.mesh.layout.tensor)
        return [_detached(terms[number]) for number in sorted(terms)]

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Totals:
        """The totals of the objective over batches, of which this process passes its rows, in evaluation mode."""
        totals = Totals()
        for batch in batches:
            annotated = self.objective.annotate(self.trainee, batch)
            denominators = whole_denominators(self.objective.denominators(annotated), self.mesh)
            cut = self.trainee.cut(annotated)
            terms: list[Terms] = []
            for role in self.trainee.trained:
                terms_of = partial(self._terms_of, LossContext(self.mesh, role))
                with self.trainee.prepared(role) as prepared:
                    terms += self.trainee.for_each_micro_batch(prepared, cut, terms_of)
            totals += self._reducer.reduced(terms, denominators)
        return totals

    def _terms_of(self, context: LossContext, model: Decoder, batch: Batch) -> Terms:
        return self.objective(model, batch, context)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While entered, the policy's weights are the moving average."""
        assert self.average is not None
        try:
            with self.average.in_place():
                self._notify_weights_changed()
                yield
        finally:
            self._notify_weights_changed()

    def _notify_weights_changed(self) -> None:
        pipeline = self.trainee.policy.pipeline
        if pipeline is not None:
            pipeline.weights_changed()

    @torch.no_grad()
    def negative_log_likelihood(self, tokens_BT: Tensor, targets_BT: Tensor) -> float:
        """−log p of the policy, summed over the targets of all rows, in nats. Every process passes the whole batch and gets the
        same sum; the caller sets evaluation mode."""
        rows = self.trainee.rows(tokens_BT.shape[0])

        def summed(model: Decoder, micro_batch: Batch) -> float:
            return summed_loss(model, micro_batch.tokens_BT, micro_batch.targets_BT, micro_batch.positions_BT)

        batch = self.trainee.cut(Batch(tokens_BT[rows], targets_BT[rows]))
        sums = self.trainee.for_each_micro_batch(self.trainee.policy, batch, summed)
        return float(self.mesh.sum(torch.tensor(sum(sums), dtype=torch.float64), self.mesh.layout.tensor))

    @torch.no_grad()
    def losses_by_source(self, batch: Batch) -> dict[str, float]:
        """Mean loss, in nats, of each source's targets in a step's whole batch, from this rank's rows of it; the same on every
        process, and empty where sources or losses of tokens are not known. One forward pass of the policy; the caller sets
        evaluation mode."""

        def summed(model: Decoder, micro_batch: Batch) -> Tensor | None:
            losses_BT = self.objective.token_losses(model, micro_batch)
            if losses_BT is None or micro_batch.sources_BT is None:
                return None
            return torch.stack(sums_by_source(losses_BT, micro_batch))

        sums = torch.zeros(2, len(batch.source_names), dtype=torch.float64)
        for found in self.trainee.for_each_micro_batch(self.trainee.policy, self.trainee.cut(batch), summed):
            sums += 0 if found is None else found
        if not batch.source_names:
            return {}
        sums_S, counts_S = self.mesh.sum(sums, self.mesh.layout.tensor)
        return mean_by_source(sums_S, counts_S, batch.source_names)


def _detached(terms: Terms) -> Terms:
    """Terms without their graph, which would otherwise be kept until the end of the step."""
    return terms._replace(sums={name: total.detach() for name, total in terms.sums.items()})
