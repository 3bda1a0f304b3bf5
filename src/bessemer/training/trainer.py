"""One optimizer step: gradients of a batch in micro-batches on any mesh, clipping, and the update.

`Totals` adds up a batch's terms over micro-batches and processes: the loss of a step, or of a validation.

Shapes: B rows of a batch, T tokens of a row, M micro-batches, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from bessemer.core.errors import ConfigError
from bessemer.distributed.collectives import clip_gradients
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.distributed.pipeline import Pipeline
from bessemer.model.decoder import Decoder
from bessemer.model.device import widest_float
from bessemer.training.data.batch import Batch
from bessemer.training.data.batches import BatchSource
from bessemer.training.model_roles import POLICY, ModelRoles
from bessemer.training.model_setup import LossScale, PreparedModel, Unscaled
from bessemer.training.objectives import (
    Count,
    LossContext,
    LossFunction,
    Objective,
    Terms,
    as_objective,
    mean_by_source,
    sums_by_source,
)
from bessemer.training.optim.optimizers import step_optimizers
from bessemer.training.optim.weight_averaging import MovingAverage
from bessemer.training.routing import balance_experts, forget_routings, routing_metrics, visits_by_layer
from bessemer.training.runtime import Runtime
from bessemer.training.validation import summed_loss


@dataclass(frozen=True)
class Figure:
    """A metric's sum, count and largest value; minus infinity where none was given."""

    sum: float
    count: float
    max: float


@dataclass(frozen=True)
class LossTotals:
    """Sums and denominators of the terms, and figures, over whole batches: the same on every process. Totals of batches add
    up."""

    sums: Mapping[str, float] = field(default_factory=dict)
    denominators: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Σ over terms of sum / denominator."""
        return sum(self.terms.values())

    @property
    def terms(self) -> dict[str, float]:
        """Each term's part of the loss."""
        return {name: total / (self.denominators[name] or 1.0) for name, total in self.sums.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """The terms as `loss_TERM`, where there are several; of each figure the mean and, as `NAME_max`, the largest value.

        A figure that counted nothing is left out.
        """
        terms = self.terms
        metrics = {f"loss_{name}": value for name, value in terms.items()} if len(terms) > 1 else {}
        for name, figure in self.figures.items():
            if not figure.count:
                continue
            metrics[name] = figure.sum / figure.count
            if figure.max > -math.inf:
                metrics[f"{name}_max"] = figure.max
        return metrics

    def __add__(self, other: Self) -> LossTotals:
        figures = dict(self.figures)
        for name, figure in other.figures.items():
            before = figures.get(name, Figure(0.0, 0.0, -math.inf))
            figures[name] = Figure(before.sum + figure.sum, before.count + figure.count, max(before.max, figure.max))
        return LossTotals(_added(self.sums, other.sums), _added(self.denominators, other.denominators), figures)


def _added(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in dict.fromkeys([*first, *second])}


def whole_denominators(counts: Mapping[str, Count], mesh: Mesh) -> dict[str, float]:
    """Denominators of a whole batch from those of this data rank's rows. One all-reduce."""
    layout = mesh.layout
    here = torch.tensor([count.value for count in counts.values()], dtype=torch.float64)
    # ranks of the other axes have the same rows
    everywhere = mesh.sum(here, layout.tensor * layout.pipeline * layout.context)
    return {
        name: count.value if count.per == "constant" else total
        for (name, count), total in zip(counts.items(), everywhere.tolist(), strict=True)
    }


class TotalsReducer:
    """Adds up the terms of a step's micro-batches over the processes of a mesh; knows the names of the figures, which only the
    last stage of a pipeline computes."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._names: list[str] | None = None

    def reduced(self, micro_batches: Sequence[Terms], denominators: Mapping[str, float]) -> LossTotals:
        """The totals of one batch. One wait for the device, and one or two all-reduces of some numbers.

        Raises AssertionError when a term has no denominator.
        """
        return self.reduced_with((), micro_batches, denominators)[0]

    def reduced_with(
        self, others: Sequence[Tensor], micro_batches: Sequence[Terms], denominators: Mapping[str, float]
    ) -> tuple[LossTotals, list[list[float]]]:
        """The totals of one batch as in `reduced`, and the numbers of other tensors, which come to the host in the same
        transfer; these are not summed."""
        names = self._figure_names(micro_batches)
        terms = list(denominators)
        present = list(dict.fromkeys(name for each in micro_batches for name in each.sums))
        assert set(present) <= set(terms), (present, terms)
        sums = torch.zeros(len(terms) + 2 * len(names), dtype=torch.float64)
        largest = torch.full((len(names),), -math.inf, dtype=torch.float64)
        numbers = [_numbers(each) for each in micro_batches]
        host = on_host([*others, *(number for each in numbers for number in each)])
        of_terms = iter(host[len(others) :])
        for each, count in zip(micro_batches, map(len, numbers), strict=True):
            values = [value for (value,) in islice(of_terms, count)]
            for place, name in enumerate(each.sums):
                sums[terms.index(name)] += values[place]
            rest = iter(values[len(each.sums) :])
            for name, metric in each.metrics.items():
                place = names.index(name)
                sums[len(terms) + place] += next(rest)
                sums[len(terms) + len(names) + place] += next(rest)
                if metric.max is not None:
                    largest[place] = max(float(largest[place]), next(rest))
        # tensor ranks have the same values; pipeline ranks without the last stage have zeros
        totals = self._mesh.sum(sums, self._mesh.layout.tensor).tolist()
        most = self._mesh.largest(largest).tolist() if names else []
        figures = {
            name: Figure(totals[len(terms) + place], totals[len(terms) + len(names) + place], most[place])
            for place, name in enumerate(names)
        }
        return LossTotals(dict(zip(terms, totals, strict=False)), denominators, figures), host[: len(others)]

    def _figure_names(self, micro_batches: Sequence[Terms]) -> list[str]:
        if self._names is None:
            here = list(dict.fromkeys(name for each in micro_batches for name in each.metrics))
            everywhere = [here]
            if self._mesh.layout.pipeline > 1:
                everywhere = [[] for _ in range(self._mesh.layout.world_size)]
                dist.all_gather_object(everywhere, here)
            self._names = max(everywhere, key=len)
        return self._names


def _numbers(terms: Terms) -> list[Tensor]:
    """The scalars of a micro-batch: sums of terms, then each metric's sum, count and, where it has one, largest value."""
    numbers = [*terms.sums.values()]
    for metric in terms.metrics.values():
        numbers += [metric.sum, torch.as_tensor(metric.count), *(() if metric.max is None else (metric.max,))]
    return numbers


def on_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The numbers of each tensor, flat. Of each device all come in one transfer, for which the host waits once."""
    values: list[list[float]] = [[] for _ in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(place)
    for places in by_device.values():
        flat = [tensors[place].detach().flatten() for place in places]
        # integers are counts, which float32 would round
        dtype = torch.float32
        for each in flat:
            dtype = torch.promote_types(dtype, each.dtype if each.is_floating_point() else widest_float(each.device))
        numbers = iter(torch.cat([each.to(dtype) for each in flat]).tolist())
        for place, each in zip(places, flat, strict=True):
            values[place] = list(islice(numbers, each.numel()))
    return values


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
        models: ModelRoles | None = None,
    ) -> None:
        """pipeline: for a model split into pipeline stages; it fixes the number of micro-batches. average: a moving average of
        the weights, updated after each step that changes them. models: the models by role, where there are several; `model` is
        its policy, and `optimizers` update all that are trained."""
        self.model = model
        self.optimizers = optimizers
        self.objective = as_objective(objective)
        self.runtime = runtime
        self.mesh = mesh
        self.average = average
        self.models = models or ModelRoles(
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
        batch = batches.batch(step, self.models.rows(size), self.mesh)
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
            for prepared in self.models.trained.values()
        ]
        # the only wait of a step for the device: the update depends on these numbers
        totals, (*values, visits) = self._reducer.reduced_with([*clipped, self.visits_LE], terms, denominators)
        norms = {role: norm for role, (norm,) in zip(self.models.trained, values, strict=True)}
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
        self.models.version += 1
        metrics = totals.metrics | {f"gradient_norm_{other}": norms[other] for other in others}
        metrics |= routing_metrics(torch.tensor(visits, dtype=torch.float64).view_as(self.visits_LE))
        return StepResult(totals.loss, norm, updated, metrics)

    def gradients(self, batch: Batch) -> LossTotals:
        """Add the gradients of the step's loss to those of the parameters of every trained model; returns its totals."""
        return self._reducer.reduced(*self._accumulate(batch))

    def _accumulate(self, batch: Batch) -> tuple[list[Terms], dict[str, float]]:
        """Add the gradients; returns the terms by micro-batch, on the device, and their denominators."""
        with torch.no_grad():
            batch = self.objective.annotate(self.models, batch)
        denominators = whole_denominators(self.objective.denominators(batch), self.mesh)
        cut = self.models.cut(batch)
        terms: list[Terms] = []
        for role, prepared in self.models.trained.items():
            terms += self._backward(role, prepared, cut, denominators)
        return terms, denominators

    def _backward(self, role: str, prepared: PreparedModel, cut: Batch, denominators: Mapping[str, float]) -> list[Terms]:
        """Add the gradients of a role's terms to those of its parameters; returns the terms by micro-batch, of a pipeline in
        its last stage."""
        micro_batches = [micro_batch.to(self._device) for micro_batch in self.models.micro_batches(cut, prepared)]
        context = LossContext(self.mesh, role)
        terms: dict[int, Terms] = {}
        #: By stage and micro-batch: a pipeline runs some forward passes twice.
        visits: dict[tuple[int, int], Tensor] = {}

        def loss(model: Decoder, number: int) -> Tensor:
            micro_terms = terms[number] = self.objective(model, micro_batches[number], context)
            weighted = [total / (denominators[name] or 1.0) for name, total in micro_terms.sums.items()]
            whole = weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum()
            return whole if self.scale.value == 1.0 else whole * self.scale.value

        def after_forward(model: Decoder, number: int) -> None:
            if model.config.num_experts and prepared.model is self.model:
                visits[getattr(model, "number", 0), number] = visits_by_layer(model)
            forget_routings(model)

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
    def evaluate(self, batches: Iterable[Batch]) -> LossTotals:
        """The totals of the objective over batches, of which this process passes its rows, in evaluation mode."""
        totals = LossTotals()
        for batch in batches:
            annotated = self.objective.annotate(self.models, batch)
            denominators = whole_denominators(self.objective.denominators(annotated), self.mesh)
            cut = self.models.cut(annotated)
            terms: list[Terms] = []
            for role in self.models.trained:
                terms_of = partial(self._terms_of, LossContext(self.mesh, role))
                with self.models.prepared(role) as prepared:
                    terms += self.models.for_each_micro_batch(prepared, cut, terms_of)
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
        pipeline = self.models.policy.pipeline
        if pipeline is not None:
            pipeline.weights_changed()

    @torch.no_grad()
    def negative_log_likelihood(self, tokens_BT: Tensor, targets_BT: Tensor) -> float:
        """−log p of the policy, summed over the targets of all rows, in nats. Every process passes the whole batch and gets the
        same sum; the caller sets evaluation mode."""
        rows = self.models.rows(tokens_BT.shape[0])

        def summed(model: Decoder, micro_batch: Batch) -> float:
            return summed_loss(model, micro_batch.tokens_BT, micro_batch.targets_BT, micro_batch.positions_BT)

        batch = self.models.cut(Batch(tokens_BT[rows], targets_BT[rows]))
        sums = self.models.for_each_micro_batch(self.models.policy, batch, summed)
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
        for source_sums in self.models.for_each_micro_batch(self.models.policy, self.models.cut(batch), summed):
            sums += 0 if source_sums is None else source_sums
        if not batch.source_names:
            return {}
        sums_S, counts_S = self.mesh.sum(sums, self.mesh.layout.tensor)
        return mean_by_source(sums_S, counts_S, batch.source_names)


def _detached(terms: Terms) -> Terms:
    """Terms without their graph, which would otherwise be kept until the end of the step."""
    return terms._replace(sums={name: total.detach() for name, total in terms.sums.items()})
